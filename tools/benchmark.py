#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
What balancing costs: time and memory of a training step, as ratios within one run.

Examples:
  python tools/benchmark.py --config-file \\
      configs/COCO-Detection/mokd_faster_rcnn_R_50_to_R_18_FPN_1x.yaml --output bench.json
  python tools/benchmark.py --config-file ... --size 800 1216 --batch 8 MODEL.DEVICE cuda

The variants take turns, round by round, so that a busy machine slows all of them alike; medians
are over rounds, and ratios are medians of the ratios within each round. No data and no weights
are needed: images and boxes are random, and all weights stay as they are (learning rate 0).

  student     Detectron2's own step of the student alone
  teacher     the teacher's forward pass
  fixed       student + teacher, plain sum of losses in Detectron2's own step: no balancing
  features    MOKD.BALANCING.RULE at the shared features
  parameters  MOKD.BALANCING.RULE at the backbone's parameters
  famo        rule "famo": a second forward pass of the student
  torchjd     TorchJD's mtl_backward with MGDA on the same losses and features
  objective X as "features", of a model with the objective X alone: one variant for each that is
              registered for detectors, with its options in the config, in MOKD.OBJECTIVES or not

  python tools/benchmark.py --config-file ... --variants "objective features" "objective outputs"

A balanced variant is timed over MOKD.BALANCING.INTERVAL steps, of which one measures, and a step's
seconds are their mean.

  python tools/benchmark.py --config-file ... --profile

shows where a step's time goes instead, part by part, in steps that measure and in the others.

"x student" is what a step costs beside the student's own, "x fixed" beside plain distillation.

Several processes, each with --batch images (the figures are those of the first one):

  torchrun --nproc-per-node 2 tools/benchmark.py --config-file ...

  python tools/benchmark.py --config-file ... --teacher-options

compares the options of MOKD.TEACHER instead: the teacher alone, the whole training step, and how
far features are from those without any option (largest difference, in standard deviations).

Peak memory is what is allocated at the worst moment of a step, parameters and optimizer included:
from torch's allocator on CUDA, from the profiler's record of every allocation on the CPU.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time

from mokd_det.command_line import TIMEOUT, add_debug, errors_as_messages, positive


def argument_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="a config with MOKD.ENABLED True")
    parser.add_argument("--size", type=positive, nargs=2, default=(256, 320), metavar=("H", "W"))
    parser.add_argument("--batch", type=positive, default=4, help="images a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--variants", nargs="+", help="of those above (all of them)")
    parser.add_argument(
        "--teacher-options", action="store_true", help="compare those of the teacher"
    )
    parser.add_argument(
        "--profile", action="store_true", help="the share of each part of a step instead"
    )
    parser.add_argument("--output", default="", help="JSON file to write")
    parser.add_argument("--trust", action="store_true", help="run the code in config files")
    add_debug(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides KEY VALUE ...")
    # One process, unless torchrun has started several.
    parser.set_defaults(num_gpus=1, num_machines=1, machine_rank=0, dist_url=None)
    parser.set_defaults(eval_only=True, timeout=TIMEOUT)
    return parser


if __name__ == "__main__":  # before torch, which --help is not to wait for
    ARGUMENTS = argument_parser().parse_args()

import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from mokd_det.balancing import Branch, build_balancer
from mokd_det.config import load_config, split_overrides, trust_files
from mokd_det.engine import (
    BalancedTrainer,
    DistillationTrainer,
    launch,
    validate,
)
from mokd_det.engine.optimizer import build_optimizer
from mokd_det.engine.profile import parts_of, profile_steps
from mokd_det.engine.trainer import wrap_distributed
from mokd_det.modeling.distillation import boundary_of
from mokd_det.modeling.supervised_model import NoBalancing
from mokd_det.objectives import OBJECTIVES
from mokd_det.tasks import TASKS, task_of

AT_FEATURES = ("MOKD.BALANCING.MEASURE_AT", "features", "MOKD.BALANCING.LAYERS", [])
OBJECTIVE_VARIANTS = {
    f"objective {name}": name
    for name in OBJECTIVES
    if TASKS.get("detection").is_one_of(OBJECTIVES.get(name).tasks)
}
VARIANTS = ("student", "teacher", "fixed", "features", "parameters", "famo", "torchjd")
VARIANTS += tuple(OBJECTIVE_VARIANTS)
NO_OPTIONS = {
    "PRECISION": "",
    "CHANNELS_LAST": False,
    "COMPILE": "",
    "INFERENCE_MODE": False,
    "STREAM": False,
}
TEACHER_OPTIONS = {
    "plain": {},
    "bfloat16": {"PRECISION": "bfloat16"},
    "float16": {"PRECISION": "float16"},
    "channels_last": {"CHANNELS_LAST": True},
    "bfloat16 channels_last": {"PRECISION": "bfloat16", "CHANNELS_LAST": True},
    "compile": {"COMPILE": "inductor"},
    "inference_mode": {"INFERENCE_MODE": True},
    "stream": {"STREAM": True},
}


class Constant:
    """A data loader that has one batch."""

    seed = 0

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        while True:
            yield self.batch


class FlatLosses(nn.Module):
    """Student and teacher as one model with one dict of losses: what needs no balancing."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.device = model.device

    def forward(self, batch):
        return {k: v for parts in self.model(batch).values() for k, v in parts.items()}


class SharedFeatures(NoBalancing):
    """All objectives use the same features, which are kept."""

    def __init__(self):
        super().__init__()
        self.balancer = build_balancer("fixed", objectives=2)  # asked only what it needs

    def _split(self, features, parameters):
        # Views, because a level may be made from another one (p6 from p5), and TorchJD's features
        # must not depend on each other.
        self.features = {name: feature.view_as(feature) for name, feature in features.items()}
        return {
            name: Branch(dict(self.features), {p: p for p in used})
            for name, used in parameters.items()
        }


def random_batch(cfg, height, width, count):
    """Random images with 8 random boxes (and masks), in Detectron2's format; each rank its own."""
    if cfg.MODEL.KEYPOINT_ON:
        raise ValueError("MODEL.KEYPOINT_ON True: the benchmark has no random keypoints.")
    generator = torch.Generator().manual_seed(comm.get_rank())
    is_retinanet = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    classes = (cfg.MODEL.RETINANET if is_retinanet else cfg.MODEL.ROI_HEADS).NUM_CLASSES
    batch = []
    for _ in range(count):
        corner = torch.rand(8, 2, generator=generator) * 0.6
        size = 0.05 + torch.rand(8, 2, generator=generator) * 0.3
        boxes = torch.cat([corner, corner + size], 1)
        boxes *= torch.tensor([width, height, width, height], dtype=torch.float32)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(classes, (8,), generator=generator)
        if cfg.MODEL.MASK_ON:
            masks = torch.zeros(8, height, width, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist()):
                mask[y0:y1, x0:x1] = True
            instances.gt_masks = BitMasks(masks)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def random_model(cfg):
    """The distillation model of a config with random weights on both sides."""
    task = task_of(cfg)
    cfg = task.untrained_config(cfg)
    with tempfile.NamedTemporaryFile(suffix=".pth") as weights:
        cfg.MOKD.TEACHER.WEIGHTS = weights.name
        teacher = build_model(task.teacher_config(cfg))
        torch.save({"model": teacher.state_dict()}, weights.name)
        model = DistillationTrainer.build_model(cfg).train()
    if getattr(model.teacher, "reader", None) is not None:
        propose_as_many_as_trained(model.teacher)
    return model


def propose_as_many_as_trained(teacher):
    """Random weights propose a few boxes only, and what they cost would not be seen."""
    propose = teacher.reader.propose
    generator = torch.Generator().manual_seed(0)

    def propose_many(state, images, limit):
        propose(state, images, limit)
        found = []
        for height, width in images.image_sizes:
            corner = torch.rand(limit, 2, generator=generator) * 0.6
            boxes = torch.cat(
                [corner, corner + 0.05 + 0.3 * torch.rand(limit, 2, generator=generator)], dim=1
            )
            found.append((boxes * torch.tensor([width, height] * 2)).to(images.device))
        return found

    teacher.reader.propose = propose_many


def stepper(trainer):
    """A function that runs one step of a trainer."""
    trainer.iter = 0

    def step():
        trainer.iter += 1
        trainer.run_step()

    return step


def whole_interval(trainer):
    """A function that runs the steps from one measurement to the next; ``steps`` says how many."""
    step = stepper(trainer)

    def run():
        for _ in range(run.steps):
            step()

    balancer = trainer.boundary.balancer
    run.steps = balancer.interval if balancer else 1
    return run


def build_steps(cfg, model, batch):
    """Return {variant: function that runs steps, or the reason why it cannot}."""
    loader, optimizer = Constant(batch), build_optimizer(cfg, model)
    distributed_model = wrap_distributed(model)
    plain = SharedFeatures()

    def with_boundary(boundary, step):
        def run():
            model.boundary = boundary
            step()
            plain.features = None  # not to be held, and counted, between steps

        run.steps = getattr(step, "steps", 1)
        return run

    def balanced(*opts):
        changed = cfg.clone()
        changed.merge_from_list(list(opts))
        try:
            model.boundary = boundary_of(changed, model.task, model.task.shared_part(model.student))
        except ValueError as error:
            return str(error)
        trainer = BalancedTrainer(distributed_model, loader, optimizer, 0)
        return with_boundary(model.boundary, whole_interval(trainer))

    def simple(model, optimizer):
        return stepper(SimpleTrainer(wrap_distributed(model), loader, optimizer))

    return {
        "student": simple(model.student, build_optimizer(cfg, model.student)),
        "teacher": lambda: model.teacher.run(batch, model.input_format),
        "fixed": with_boundary(plain, simple(FlatLosses(model), optimizer)),
        "features": balanced(*AT_FEATURES),
        "parameters": balanced("MOKD.BALANCING.MEASURE_AT", "parameters"),
        "famo": balanced(*AT_FEATURES, "MOKD.BALANCING.RULE", "famo"),
        "torchjd": torchjd_step(model, batch, optimizer, plain, with_boundary),
    }


def model_of_objective(cfg, name):
    """The same student and teacher with one objective; ValueError if they do not support it."""
    cfg = cfg.clone()
    cfg.merge_from_list([*AT_FEATURES, "MOKD.OBJECTIVES", [name]])
    rule = cfg.MOKD.BALANCING.get(cfg.MOKD.BALANCING.RULE.upper(), {})
    if "WEIGHTS" in rule:
        rule.WEIGHTS = []  # the config's are for all of its objectives
    seed_all_rng(0)
    return random_model(cfg)


def build_objective_step(cfg, name, batch):
    """Return the model of one objective, and its step; or None and the reason why it cannot."""
    # A model of its own: the teacher computes only what objectives have asked for.
    try:
        model = model_of_objective(cfg, name)
    except ValueError as error:
        return None, str(error)
    optimizer = build_optimizer(cfg, model)
    trainer = BalancedTrainer(wrap_distributed(model), Constant(batch), optimizer, 0)
    return model, whole_interval(trainer)


def torchjd_step(model, batch, optimizer, plain, with_boundary):
    """TorchJD's multi-task backward, with its defaults, at the student's features; min-norm."""
    if len(model.names) != 2:
        return "this comparison is for one distillation objective: features or outputs"
    if comm.get_world_size() > 1:
        return "TorchJD averages no gradients over processes"
    try:
        from torchjd.aggregation import MGDA
        from torchjd.autojac import jac_to_grad, mtl_backward
    except ImportError as error:
        return f"TorchJD is not installed ({error}): pip install -e '.[balancers]'"
    aggregator = MGDA()
    shared = [p for p in model.student.backbone.parameters() if p.requires_grad]
    is_shared = {id(p) for p in shared}
    heads = [p for p in model.student.parameters() if p.requires_grad and id(p) not in is_shared]
    tasks_params = [heads, list(model.objectives.parameters())]

    def step():
        objectives = model(batch)
        losses = [sum(parts.values()) for parts in objectives.values()]
        optimizer.zero_grad()
        features = [f for f in plain.features.values() if f.requires_grad]
        mtl_backward(losses, features, tasks_params=tasks_params, shared_params=shared)
        jac_to_grad(shared, aggregator)
        for parts in objectives.values():  # as Detectron2 reads them for its log
            for name, loss in parts.items():
                get_event_storage().put_scalar(name, loss.item())
        optimizer.step()

    return with_boundary(plain, step)


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    comm.synchronize()


def time_rounds(steps, rounds, device):
    """Return {name: seconds a step in each round}; all take turns, after two runs to warm up."""
    for step in steps.values():
        step()
        step()
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            synchronise(device)
            start = time.perf_counter()
            step()
            synchronise(device)
            seconds[name].append((time.perf_counter() - start) / getattr(step, "steps", 1))
    return seconds


def ratio(of, to):
    """The median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(of, to))


def resident_bytes(variant, model):
    """What a variant keeps between two steps: weights, buffers and the optimizer's state."""
    modules = {"student": [model.student], "teacher": [model.teacher.model]}
    modules = modules.get(variant, [model, model.teacher.model])
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    tensors += [p for m in modules for p in m.parameters() if p.requires_grad]  # momentum
    return sum(t.numel() * t.element_size() for t in tensors)


def peak_bytes(step, device, resident):
    """Largest memory during a step that starts with ``resident`` bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return resident + torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        step()
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profiler.export_chrome_trace(trace.name)
        with open(trace.name) as f:
            events = json.load(f)["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    now = peak = resident
    for _, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak


def compare_variants(cfg, model, batch, rounds, names):
    """
    Returns:
        dict: ``variants``, {name: {seconds, quartiles, peak_bytes, vs_student, vs_fixed,
        memory_vs_fixed} or {error}}; ``ratios``; ``seconds_of_rounds``.
    """
    steps = build_steps(cfg, model, batch)
    models = dict.fromkeys(steps, model)
    for name in OBJECTIVE_VARIANTS:
        if name in names:
            models[name], steps[name] = build_objective_step(cfg, OBJECTIVE_VARIANTS[name], batch)
    steps = {name: steps[name] for name in VARIANTS if name in {*names, "student", "fixed"}}
    errors = {name: {"error": step} for name, step in steps.items() if isinstance(step, str)}
    steps = {name: step for name, step in steps.items() if name not in errors}
    variants = {}
    with EventStorage():
        seconds = time_rounds(steps, rounds, model.device)
        for name, values in seconds.items():
            for parameter in models[name].parameters():
                parameter.grad = None
            low, median, high = statistics.quantiles(values, n=4)
            peak = peak_bytes(steps[name], model.device, resident_bytes(name, models[name]))
            variants[name] = {"seconds": median, "quartiles": [low, high], "peak_bytes": peak}
    for name, values in seconds.items():
        entry = variants[name]
        entry["vs_student"] = ratio(values, seconds["student"])
        entry["vs_fixed"] = ratio(values, seconds["fixed"])
        entry["memory_vs_fixed"] = entry["peak_bytes"] / variants["fixed"]["peak_bytes"]
    ratios = {}
    if "teacher" in seconds:
        parts = [a + b for a, b in zip(seconds["student"], seconds["teacher"])]
        for name in ("fixed", "features"):
            if name in seconds:
                ratios[f"{name} / (student + teacher)"] = ratio(seconds[name], parts)
    if {"torchjd", "features"} <= set(seconds):
        ratios["torchjd / features"] = ratio(seconds["torchjd"], seconds["features"])
    return {"variants": variants | errors, "ratios": ratios, "seconds_of_rounds": seconds}


def compare_teachers(cfg, batch, rounds):
    """Return {option: {seconds, vs_plain, step_seconds, step_vs_plain, difference} or {error}}."""
    alone, whole, result = {}, {}, {}
    for name, options in TEACHER_OPTIONS.items():
        changed = cfg.clone()
        changed.MOKD.TEACHER.update(NO_OPTIONS | options)
        seed_all_rng(0)  # every option has the same weights
        try:
            model = random_model(changed)
        except ValueError as error:
            result[name] = {"error": str(error)}
            continue
        outputs = model.teacher.run(batch, model.input_format)
        model.teacher.wait(outputs)
        if name == "plain":
            plain = outputs.features
        differences = [((outputs.features[k] - x) / x.std()).abs().max() for k, x in plain.items()]
        result[name] = {"difference": max(differences).item()}
        alone[name] = lambda model=model: model.teacher.run(batch, model.input_format)
        optimizer = build_optimizer(changed, model)
        whole[name] = stepper(BalancedTrainer(model, Constant(batch), optimizer, 0))
    for steps, prefix in ((alone, ""), (whole, "step_")):
        with EventStorage():
            seconds = time_rounds(steps, rounds, model.device)
        for name, values in seconds.items():
            result[name][f"{prefix}seconds"] = statistics.median(values)
            result[name][f"{prefix}vs_plain"] = ratio(values, seconds["plain"])
    return result


def compare_parts(cfg, batch, count):
    """Return {"measuring" or "in between": {part: {seconds, share, gflops}}} of a step."""
    result = {}
    for name, interval in (("measuring", 1), ("in between", 10**9)):
        changed = cfg.clone()
        changed.MOKD.BALANCING.INTERVAL = interval
        seed_all_rng(0)
        model = random_model(changed)
        optimizer = build_optimizer(changed, model)
        step = stepper(BalancedTrainer(model, Constant(batch), optimizer, 0))
        with EventStorage():
            step()
            step()
            parts = profile_steps(step, parts_of(model), count, model.device)
        total = sum(entry["seconds"] for entry in parts.values())
        result[name] = {k: {**v, "share": v["seconds"] / total} for k, v in parts.items()}
    return result


def use_cpu_if_there_is_no_gpu(cfg):
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"


def machine(device):
    cpu = platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu,
        "processes": comm.get_world_size(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def print_table(title, columns, entries):
    """``columns``: {heading: (width, function from an entry to its text)}."""
    print(f"{title:<40}", *(f"{name:>{width}}" for name, (width, _) in columns.items()))
    for name, entry in entries.items():
        if "error" in entry:
            print(f"{name:<40} {entry['error']}")
        else:
            print(f"{name:<40}", *(f"{text(entry):>{width}}" for width, text in columns.values()))


VARIANT_COLUMNS = {
    "seconds": (8, lambda e: f"{e['seconds']:.3f}"),
    "quartiles": (15, lambda e: "{:.3f}-{:.3f}".format(*e["quartiles"])),
    "x student": (9, lambda e: f"{e['vs_student']:.3f}"),
    "x fixed": (8, lambda e: f"{e['vs_fixed']:.3f}"),
    "MiB": (7, lambda e: f"{e['peak_bytes'] / 2**20:.0f}"),
    "MiB x fixed": (11, lambda e: f"{e['memory_vs_fixed']:.3f}"),
}
TEACHER_COLUMNS = {
    "seconds": (8, lambda e: f"{e['seconds']:.3f}"),
    "x plain": (8, lambda e: f"{e['vs_plain']:.3f}"),
    "step": (8, lambda e: f"{e['step_seconds']:.3f}"),
    "step x plain": (12, lambda e: f"{e['step_vs_plain']:.3f}"),
    "difference": (10, lambda e: f"{e['difference']:.2e}"),
}


PART_COLUMNS = {
    "seconds": (8, lambda e: f"{e['seconds']:.3f}"),
    "share": (7, lambda e: f"{e['share']:.1%}"),
    "GFLOP": (8, lambda e: f"{e['gflops']:.1f}"),
}


def read_config(args):
    """Return the config, its learning rate 0, after checking the arguments."""
    if args.rounds < 2:
        raise ValueError(f"--rounds is {args.rounds}: expected 2 or more.")
    if unknown := [name for name in args.variants if name not in VARIANTS]:
        raise ValueError(f"--variants has {unknown}: expected some of {', '.join(VARIANTS)}.")
    if (args.teacher_options or args.profile) and comm.get_world_size() > 1:
        raise ValueError(
            "--teacher-options and --profile look at one process: start it without torchrun."
        )
    cfg = load_config(args.config_file, args.opts)
    if not cfg.MOKD.ENABLED or task_of(cfg).name != "detection":
        raise ValueError(
            f"--config-file '{args.config_file}' must be of a detector with MOKD.ENABLED True."
        )
    validate(cfg, is_training=False)
    use_cpu_if_there_is_no_gpu(cfg)
    cfg.SOLVER.BASE_LR = 0.0
    # Random weights agree with nothing, and an objective that is not trusted costs less.
    cfg.MOKD.BALANCING.LOSS_RATIO.AGREEMENT = 0.0
    return cfg


def benchmark(args):
    args.variants, overrides = split_overrides(args.variants or VARIANTS)
    args.opts = overrides + args.opts
    cfg = read_config(args)
    seed_all_rng(0)
    batch = random_batch(cfg, *args.size, args.batch)
    result = {
        "machine": machine(torch.device(cfg.MODEL.DEVICE)),
        "config": args.config_file,
        "size": list(args.size),
        "batch": args.batch,
        "rounds": args.rounds,
    }
    if args.teacher_options:
        result["teacher_options"] = compare_teachers(cfg, batch, args.rounds)
    elif args.profile:
        result["parts"] = compare_parts(cfg, batch, args.rounds)
    else:
        model = random_model(cfg)
        result |= compare_variants(cfg, model, batch, args.rounds, args.variants)
    if not comm.is_main_process():
        return
    print(f"{result['machine']}; {args.batch} images of {args.size[0]} x {args.size[1]}")
    if args.teacher_options:
        print_table("option", TEACHER_COLUMNS, result["teacher_options"])
    elif args.profile:
        for name, parts in result["parts"].items():
            print_table(f"steps {name}", PART_COLUMNS, parts)
    else:
        print_table("variant", VARIANT_COLUMNS, result["variants"])
        for name, value in result["ratios"].items():
            print(f"{name}: {value:.3f}")
    if args.output:
        with open(args.output, "w") as f:
            json.dump(result, f, indent=1)
        print(args.output)


def main(args):
    trust_files(args.trust)
    with errors_as_messages(args.debug):
        benchmark(args)


if __name__ == "__main__":
    launch(main, ARGUMENTS)
