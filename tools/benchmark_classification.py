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
import time

from mokd_det.command_line import add_debug, errors_as_messages, positive


def argument_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="of a classifier")
    parser.add_argument("--loader", action="store_true", help="measure the training loader")
    parser.add_argument(
        "--size", type=positive, default=128, help="side of the images (%(default)s)"
    )
    parser.add_argument("--batch", type=positive, default=32, help="images a step (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=20, help="or batches (%(default)s)")
    parser.add_argument("--output", default="", help="JSON file to write")
    parser.add_argument("--trust", action="store_true", help="run the code in config files")
    add_debug(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides KEY VALUE ...")
    return parser


if __name__ == "__main__":  # before torch, which --help is not to wait for
    ARGUMENTS = argument_parser().parse_args()

import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)
import torch
from benchmark import (
    Constant,
    machine,
    print_table,
    random_model,
    ratio,
    time_rounds,
    use_cpu_if_there_is_no_gpu,
    whole_interval,
)
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from mokd_det.config import load_config, trust_files
from mokd_det.data import check_datasets, register_datasets
from mokd_det.data.classification import Batch
from mokd_det.engine import BalancedTrainer, validate
from mokd_det.engine.optimizer import build_optimizer
from mokd_det.modeling import SupervisedModel
from mokd_det.tasks import task_of

FIXED = ["MOKD.BALANCING.RULE", "fixed"]


def step_of(cfg, model, batch):
    """A function that makes the steps of our trainer from one measurement to the next."""
    return whole_interval(BalancedTrainer(model, Constant(batch), build_optimizer(cfg, model), 0))


def with_options(cfg, *opts):
    cfg = cfg.clone()
    cfg.merge_from_list(list(opts))
    return cfg


def torchdistill_step(cfg, model, batch):
    """
    The same with torchdistill's DistillationBox, for the networks of ``model``.

    Raises:
        ImportError: it is not installed.
    """
    from torchdistill.core.distillation import DistillationBox

    config = torchdistill_config(cfg, model.student.head_name, model.teacher.model.head_name)
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


def torchdistill_config(cfg, head, teacher_head):
    """Training with :func:`torchdistill_criterion`."""
    return {
        "num_epochs": 1,
        "teacher": {
            "forward_proc": "forward_batch_only",
            "forward_hook": {"output": [teacher_head]},
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
        "criterion": torchdistill_criterion(cfg, head, teacher_head),
    }


def torchdistill_criterion(cfg, head, teacher_head):
    """Cross-entropy and KDLoss on the outputs of two modules, by their names."""
    logits = {"module_path": head, "io": "output"}
    return {
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
                            "teacher_module_path": teacher_head,
                            "teacher_module_io": "output",
                            "temperature": cfg.MOKD.LOGITS.TEMPERATURE,
                            "alpha": 0.0,
                        },
                    },
                    "weight": cfg.MOKD.LOGITS.TEMPERATURE**2,
                },
            }
        },
    }


def compare_steps(cfg, size, count, rounds):
    """Return {variant: {seconds, images_per_second, vs_student, vs_torchdistill} or {error}}."""
    cfg.SOLVER.BASE_LR = 0.0
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.INPUT.CLASSIFICATION.SIZE_TRAIN = size
    cfg.MOKD.BALANCING.LOSS_RATIO.AGREEMENT = 0.0  # as benchmark.py
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    classes = torch.randint(cfg.MODEL.CLASSIFIER.NUM_CLASSES, (count,), generator=generator)
    batch = Batch(images, classes)
    if cfg.MOKD.TEACHER.PRECISION == "auto":  # torchdistill's teacher has the student's
        cfg.MOKD.TEACHER.PRECISION = ""
    logits = with_options(cfg, "MOKD.OBJECTIVES", ["logits"])
    every = with_options(cfg, "MOKD.OBJECTIVES", ["features", "logits"])
    model = random_model(with_options(logits, *FIXED))
    steps = {
        "student": step_of(cfg, SupervisedModel(random_model(cfg).student).train(), batch),
        "fixed": step_of(cfg, model, batch),
        "balanced": step_of(cfg, random_model(logits), batch),
        "all": step_of(cfg, random_model(every), batch),
    }
    result = {}
    if model.teacher.is_resized:
        side = cfg.MOKD.TEACHER.IMAGE_SIZE
        result["torchdistill"] = {"error": f"left out: MOKD.TEACHER.IMAGE_SIZE is {side}"}
    else:
        other = random_model(with_options(logits, *FIXED))
        try:
            steps["torchdistill"] = torchdistill_step(cfg, other, batch)
            check_equal(steps["torchdistill"], other, batch)
        except ImportError as error:
            result["torchdistill"] = {"error": f"not installed ({error}): pip install torchdistill"}
    with EventStorage():
        seconds = time_rounds(steps, rounds, model.device)
    for name, values in seconds.items():
        median = statistics.median(values)
        result[name] = {"seconds": median, "images_per_second": count / median}
        result[name]["vs_student"] = ratio(values, seconds["student"])
        if "torchdistill" in seconds:
            result[name]["vs_torchdistill"] = ratio(values, seconds["torchdistill"])
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


def measure_loader(cfg, rounds):
    """Return images a second of the training loader alone, after its workers have started."""
    register_datasets(cfg)
    check_datasets(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    loader = iter(task_of(cfg).build_train_loader(cfg))
    count = max(cfg.DATALOADER.NUM_WORKERS, 1) * 4  # what workers have prefetched, and more
    for _ in itertools.islice(loader, count):
        pass
    start = time.perf_counter()
    images = sum(len(batch) for batch in itertools.islice(loader, rounds))
    seconds = time.perf_counter() - start
    return {"images_per_second": images / seconds, "workers": cfg.DATALOADER.NUM_WORKERS}


COLUMNS = {
    "seconds": (8, lambda e: f"{e['seconds']:.3f}"),
    "images/s": (9, lambda e: f"{e['images_per_second']:.1f}"),
    "x student": (9, lambda e: f"{e.get('vs_student', float('nan')):.3f}"),
    "x torchdistill": (14, lambda e: f"{e.get('vs_torchdistill', float('nan')):.3f}"),
}


def benchmark(args):
    cfg = load_config(args.config_file, args.opts)
    if task_of(cfg).name != "classification" or not (args.loader or cfg.MOKD.ENABLED):
        raise ValueError(
            f"--config-file '{args.config_file}' must be of a classifier with MOKD.ENABLED True "
            "(with --loader: of any classifier)."
        )
    validate(cfg, is_training=False)
    use_cpu_if_there_is_no_gpu(cfg)
    seed_all_rng(0)
    result = {"machine": machine(torch.device(cfg.MODEL.DEVICE)), "config": args.config_file}
    print(result["machine"])
    if args.loader:
        result["loader"] = measure_loader(cfg, args.rounds)
        print(f"{result['loader']['images_per_second']:.0f} images/s, {result['loader']}")
    else:
        result |= {"size": args.size, "batch": args.batch, "rounds": args.rounds}
        result["steps"] = compare_steps(cfg, args.size, args.batch, args.rounds)
        print_table("variant", COLUMNS, result["steps"])
    if args.output:
        with open(args.output, "w") as f:
            json.dump(result, f, indent=1)
        print(args.output)


def main(args):
    trust_files(args.trust)
    with errors_as_messages(args.debug):
        benchmark(args)


if __name__ == "__main__":
    main(ARGUMENTS)
