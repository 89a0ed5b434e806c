#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
What a training step of a distilled classifier costs, beside the same in torchdistill; and what the
loader delivers.

Examples:
  python tools/benchmark_classification.py --config-file \\
      configs/ImageNet-Classification/mokd_resnet34_to_resnet18.yaml --size 128 --batch 32
  python tools/benchmark_classification.py --loader --config-file \\
      configs/ImageNet-Classification/resnet18.yaml DATALOADER.NUM_WORKERS 8

The first needs no data and no weights: images are random, and weights stay as they are (learning
rate 0). Steps take turns, round by round; ratios are medians of those within each round.

  student       the student alone, our step
  torchdistill  teacher and student, cross-entropy + logits (Hinton et al. 2015), fixed weights
  fixed         the same losses in our step, fixed weights
  balanced      the same losses with MOKD.BALANCING
  all           features in a subspace as a third objective, with MOKD.BALANCING

torchdistill gets images that are normalised already, on the device; our step normalises them. It
shows teacher and student the same ones, so with MOKD.TEACHER.IMAGE_SIZE it is left out. The
second reads the training set of the config with its augmentation, and no model.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time

import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)
import torch
from benchmark import Constant, machine, time_rounds
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from mokd_det.config import load_config
from mokd_det.data import check_datasets, register_datasets
from mokd_det.data.classification import Batch, build_train_loader
from mokd_det.engine import BalancedTrainer, DistillationTrainer
from mokd_det.engine.optimizer import build_optimizer
from mokd_det.modeling import SupervisedModel, is_classifier
from mokd_det.modeling.classification import distillation
from mokd_det.modeling.classification.classifier import Classifier
from mokd_det.modeling.classification.teacher import ClassifierTeacher
from mokd_det.modeling.trained import teacher_config


def random_teacher(cfg):
    """The teacher of a config with random weights."""
    named = cfg.clone()
    with tempfile.NamedTemporaryFile(suffix=".pth") as weights:  # must be there, but is not read
        named.MOKD.TEACHER.WEIGHTS = weights.name
        teacher = teacher_config(named)
    teacher.MODEL.WEIGHTS = teacher.MODEL.CLASSIFIER.WEIGHTS = ""
    model = Classifier(teacher).to(cfg.MODEL.DEVICE)
    student_size = cfg.INPUT.CLASSIFICATION.SIZE_TRAIN
    size = cfg.MOKD.TEACHER.IMAGE_SIZE or student_size
    return ClassifierTeacher(model, size, size != student_size)


def trainer_step(cfg, batch, *opts):
    """A function that makes one step of our trainer for the config with overrides."""
    cfg = cfg.clone()
    cfg.merge_from_list(list(opts))
    model = DistillationTrainer.build_model(cfg)
    trainer = BalancedTrainer(model.train(), Constant(batch), build_optimizer(cfg, model), 0)
    trainer.iter = 0

    def step():
        trainer.iter += 1
        trainer.run_step()

    return step, model


def torchdistill_step(cfg, model, batch):
    """
    The same with torchdistill's DistillationBox, for the networks of ``model``.

    Raises:
        ImportError: it is not installed.
    """
    from torchdistill.core.distillation import DistillationBox

    head = model.student.head_name
    logits = {"module_path": head, "io": "output"}
    criterion = {
        "key": "WeightedSumLoss",
        "kwargs": {
            "sub_terms": {
                "task": {
                    "criterion": {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}},
                    "criterion_wrapper": {
                        "key": "SimpleLossWrapper",
                        "kwargs": {
                            "input": {"is_from_teacher": False, **logits},
                            "target": {"uses_label": True},
                        },
                    },
                    "weight": 1.0,
                },
                "logits": {
                    "criterion": {
                        "key": "KDLoss",
                        "kwargs": {
                            "student_module_path": head,
                            "student_module_io": "output",
                            "teacher_module_path": model.teacher.model.head_name,
                            "teacher_module_io": "output",
                            "temperature": cfg.MOKD.OUTPUTS.TEMPERATURE,
                            "alpha": 0.0,
                        },
                    },
                    "weight": cfg.MOKD.OUTPUTS.TEMPERATURE**2,
                },
            }
        },
    }
    config = {
        "num_epochs": 1,
        "teacher": {
            "forward_proc": "forward_batch_only",
            "forward_hook": {"output": [model.teacher.model.head_name]},
            "requires_grad": False,
        },
        "student": {
            "forward_proc": "forward_batch_only",
            "forward_hook": {"output": [head]},
            "requires_grad": True,
        },
        "optimizer": {
            "key": "SGD",
            "kwargs": {"lr": 0.0, "momentum": cfg.SOLVER.MOMENTUM, "weight_decay": 1e-4},
        },
        "criterion": criterion,
    }
    teacher, student = model.teacher.model.network, model.student.network
    box = DistillationBox(
        teacher.eval(), student.train(), {}, config, model.device, None, False, 1.0
    )
    images, targets = model.student.preprocess(batch.images), batch.targets.to(model.device)

    def step():
        box.pre_epoch_process(epoch=0)
        loss = box.forward_process(images, targets)
        box.post_forward_process(loss=loss)
        loss.item()  # as its example script logs it, and as our step logs its losses
        return loss

    return step


def compare_steps(args, cfg):
    """Return {variant: {seconds, images_per_second, vs_torchdistill} or {error}}."""
    cfg.SOLVER.BASE_LR = 0.0
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.MODEL.CLASSIFIER.WEIGHTS = ""
    cfg.INPUT.CLASSIFICATION.SIZE_TRAIN = args.size
    distillation.build_classifier_teacher = random_teacher
    generator = torch.Generator().manual_seed(0)
    size = (args.batch, 3, args.size, args.size)
    images = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    classes = cfg.MODEL.CLASSIFIER.NUM_CLASSES
    batch = Batch(images, torch.randint(classes, (args.batch,), generator=generator))
    two = ["MOKD.FEATURES.ENABLED", False, "MOKD.OUTPUTS.ENABLED", True]
    fixed = ["MOKD.BALANCING.RULE", "fixed", "MOKD.BALANCING.WEIGHTS", [1.0, 1.0]]
    steps, result = {}, {}
    student = Classifier(cfg).to(cfg.MODEL.DEVICE)
    supervised = SupervisedModel(student).train()
    alone = BalancedTrainer(supervised, Constant(batch), build_optimizer(cfg, supervised), 0)
    alone.iter = 0
    steps["student"] = alone.run_step
    steps["fixed"], model = trainer_step(cfg, batch, *two, *fixed)
    steps["balanced"], _ = trainer_step(cfg, batch, *two)
    steps["all"], _ = trainer_step(cfg, batch, "MOKD.OUTPUTS.ENABLED", True)
    try:
        _, twin = trainer_step(cfg, batch, *two, *fixed)
        if twin.teacher.is_resized:
            size = cfg.MOKD.TEACHER.IMAGE_SIZE
            result["torchdistill"] = {"error": f"left out: MOKD.TEACHER.IMAGE_SIZE is {size}"}
        else:
            steps["torchdistill"] = torchdistill_step(cfg, twin, batch)
            check_equal(steps["torchdistill"], twin, batch)
    except ImportError as error:
        result["torchdistill"] = {"error": f"not installed ({error}): pip install torchdistill"}
    with EventStorage():
        seconds = time_rounds(steps, args.rounds, model.device)
    for name, values in seconds.items():
        median = statistics.median(values)
        result[name] = {"seconds": median, "images_per_second": args.batch / median}
        if "torchdistill" in seconds:
            ratios = [a / b for a, b in zip(values, seconds["torchdistill"])]
            result[name]["vs_torchdistill"] = statistics.median(ratios)
    return result


def check_equal(step, model, batch):
    """RuntimeError unless torchdistill's loss is ours: else nothing is compared."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = step().item()
        torch.manual_seed(0)
        ours = sum(sum(parts.values()) for parts in model(batch).values()).item()
    if abs(ours - theirs) > 1e-3 * abs(theirs):
        raise RuntimeError(
            f"torchdistill's loss is {theirs}, ours {ours}: not the same objectives."
        )


def measure_loader(args, cfg):
    """Return images a second of the training loader alone, after its workers have started."""
    register_datasets(cfg)
    check_datasets(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    loader = iter(build_train_loader(cfg))
    count = max(cfg.DATALOADER.NUM_WORKERS, 1) * 4  # what workers have prefetched, and more
    for _ in itertools.islice(loader, count):
        pass
    start = time.perf_counter()
    images = sum(len(batch) for batch in itertools.islice(loader, args.rounds))
    seconds = time.perf_counter() - start
    return {"images_per_second": images / seconds, "workers": cfg.DATALOADER.NUM_WORKERS}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="of a classifier")
    parser.add_argument("--loader", action="store_true", help="measure the training loader")
    parser.add_argument("--size", type=int, default=128, help="side of the images (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="or batches (%(default)s)")
    parser.add_argument("--output", default="", help="JSON file to write")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides KEY VALUE ...")
    args = parser.parse_args()
    cfg = load_config(args.config_file, args.opts)
    if not is_classifier(cfg) or not (args.loader or cfg.MOKD.ENABLED):
        raise ValueError(
            f"--config-file '{args.config_file}' must be of a classifier with MOKD.ENABLED True "
            "(with --loader: of any classifier)."
        )
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    seed_all_rng(0)
    result = {"machine": machine(torch.device(cfg.MODEL.DEVICE)), "config": args.config_file}
    print(result["machine"])
    if args.loader:
        result["loader"] = measure_loader(args, cfg)
        print(f"{result['loader']['images_per_second']:.0f} images/s, {result['loader']}")
    else:
        result |= {"size": args.size, "batch": args.batch, "rounds": args.rounds}
        result["steps"] = compare_steps(args, cfg)
        print(f"{'variant':<13} {'seconds':>8} {'images/s':>9} {'x torchdistill':>14}")
        for name, entry in result["steps"].items():
            if "error" in entry:
                print(f"{name:<13} {entry['error']}")
                continue
            ratio = f"{entry['vs_torchdistill']:14.3f}" if "vs_torchdistill" in entry else ""
            print(f"{name:<13} {entry['seconds']:8.3f} {entry['images_per_second']:9.1f} {ratio}")
    if args.output:
        with open(args.output, "w") as f:
            json.dump(result, f, indent=1)
        print(args.output)


if __name__ == "__main__":
    main()
