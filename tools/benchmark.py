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

  student           Detectron2's own step of the student alone
  teacher_backbone  the teacher's forward pass up to its features
  fixed             student + teacher, plain sum of losses in Detectron2's own step: no balancing
  features          MOKD.BALANCING.RULE at the shared features
  parameters        MOKD.BALANCING.RULE at the backbone's parameters
  famo              rule "famo": a second forward pass of the student
  torchjd           TorchJD's mtl_backward with MGDA on the same losses and features

Several processes, each with --batch images (the figures are those of the first one):

  torchrun --nproc-per-node 2 tools/benchmark.py --config-file ...

  python tools/benchmark.py --config-file ... --teacher-options

compares the options of MOKD.TEACHER instead: the teacher alone, the whole training step, and how
far features are from those without any option (largest difference, in standard deviations).

Peak memory is what is allocated at the worst moment of a step, parameters and optimizer included:
from torch's allocator on CUDA, from the profiler's record of every allocation on the CPU.
"""

import argparse
import inspect
import json
import platform
import statistics
import tempfile
import time

import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from mokd_det.balancing import Boundary, build_boundary
from mokd_det.config import find_config, get_cfg, load_config, split_overrides
from mokd_det.engine import BalancedTrainer, DistillationTrainer, launch
from mokd_det.engine.trainer import wrap_distributed
from mokd_det.modeling import build_teacher

VARIANTS = ("student", "teacher_backbone", "fixed", "features", "parameters", "famo", "torchjd")


TEACHER_OPTIONS = {
    "plain": [],
    "bfloat16": ["PRECISION", "bfloat16"],
    "float16": ["PRECISION", "float16"],
    "channels_last": ["CHANNELS_LAST", True],
    "bfloat16 channels_last": ["PRECISION", "bfloat16", "CHANNELS_LAST", True],
    "compile": ["COMPILE", "inductor"],
    "inference_mode": ["INFERENCE_MODE", True],
    "stream": ["STREAM", True],
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


class NoBoundary(Boundary):
    """All objectives use the same features."""

    def split(self, features, objectives, names=None, extra=None, own=()):
        # Views, because a level may be made from another one (p6 from p5), and TorchJD's features
        # must not depend on each other.
        self.features = [feature.view_as(feature) for feature in features]
        extra = extra or {}
        return [[*self.features, *extra.get(i, ())] for i in range(objectives)]


def random_batch(cfg, height, width, count):
    """Random images with 8 random boxes (and masks), in Detectron2's format; each rank its own."""
    generator = torch.Generator().manual_seed(comm.get_rank())
    classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        classes = cfg.MODEL.RETINANET.NUM_CLASSES
    if cfg.MODEL.KEYPOINT_ON:
        raise ValueError("MODEL.KEYPOINT_ON True: the benchmark has no random keypoints.")
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


def build(cfg):
    """The distillation model of a config with random weights on both sides."""
    cfg.MODEL.WEIGHTS = cfg.MODEL.TORCHVISION.WEIGHTS = ""
    option = "MOKD.TEACHER.CONFIG_FILE"
    if not cfg.MOKD.TEACHER.CONFIG_FILE.endswith(".yaml"):
        raise ValueError(f"The benchmark needs a teacher with a .yaml config in {option}.")
    teacher_file, _ = find_config(cfg.MOKD.TEACHER.CONFIG_FILE, option)
    teacher = load_config(teacher_file, cfg.MOKD.TEACHER.OPTS, option=option)
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher.MODEL.WEIGHTS = teacher.MODEL.TORCHVISION.WEIGHTS = ""
    with tempfile.NamedTemporaryFile(suffix=".pth") as weights:
        torch.save({"model": build_model(teacher).state_dict()}, weights.name)
        cfg.MOKD.TEACHER.WEIGHTS = weights.name
        return DistillationTrainer.build_model(cfg).train()


def build_steps(cfg, model, batch):
    """Return {variant: function that runs one step}, or the reason why it cannot."""
    cfg.SOLVER.BASE_LR = 0.0
    balancing = {key.lower(): value for key, value in cfg.MOKD.BALANCING.items()}
    balancing["steps"] = cfg.SOLVER.MAX_ITER
    shared = model.student.backbone
    no_boundary = NoBoundary(balancer=build_boundary("fixed").balancer)
    loader = Constant(batch)
    optimizer = build_optimizer(cfg, model)
    distributed_model = wrap_distributed(model)

    def with_boundary(boundary, step):
        def run():
            model.boundary = boundary
            step()
            no_boundary.features = None  # not to be held, and counted, between steps

        return run

    def balanced(**options):
        try:
            boundary = build_boundary(shared=shared, **{**balancing, **options})
        except ValueError as error:
            return str(error)
        model.boundary = boundary
        return with_boundary(
            boundary, _stepper(BalancedTrainer(distributed_model, loader, optimizer, 0))
        )

    def teacher_backbone():
        model.teacher.view(batch, model.input_format)

    student_optimizer = build_optimizer(cfg, model.student)
    steps = {
        "student": _stepper(
            SimpleTrainer(wrap_distributed(model.student), loader, student_optimizer)
        ),
        "teacher_backbone": teacher_backbone,
        "fixed": with_boundary(
            no_boundary,
            _stepper(SimpleTrainer(wrap_distributed(FlatLosses(model)), loader, optimizer)),
        ),
        "features": balanced(place="features", layers=(), gram="batch"),
        "parameters": balanced(place="parameters", gram="batch"),
        "famo": balanced(place="features", rule="famo", layers=(), gram="batch"),
    }
    if len(model.objectives) != 2:
        steps["torchjd"] = "this comparison is for one distillation objective: features or outputs"
        return steps
    if comm.get_world_size() > 1:
        steps["torchjd"] = "TorchJD averages no gradients over processes"
        return steps
    try:
        step = torchjd_step(model, batch, optimizer, no_boundary)
        steps["torchjd"] = with_boundary(no_boundary, step)
    except ImportError as error:
        steps["torchjd"] = f"TorchJD is not installed ({error}): pip install -e '.[balancers]'"
    return steps


def compare_teachers(cfg, model, batch, rounds):
    """Return {option: {seconds, vs_plain, step_seconds, step_vs_plain, difference} or {error}}."""
    cfg.SOLVER.BASE_LR = 0.0
    optimizer = build_optimizer(cfg, model)
    step = _stepper(BalancedTrainer(model, Constant(batch), optimizer, 0))
    alone, whole, result = {}, {}, {}
    with tempfile.NamedTemporaryFile(suffix=".pth") as weights:
        torch.save({"model": model.teacher.model.state_dict()}, weights.name)
        for name, options in TEACHER_OPTIONS.items():
            opts = [f"MOKD.TEACHER.{v}" if i % 2 == 0 else v for i, v in enumerate(options)]
            option_cfg = cfg.clone()
            for key in ("PRECISION", "CHANNELS_LAST", "COMPILE", "INFERENCE_MODE", "STREAM"):
                option_cfg.MOKD.TEACHER[key] = get_cfg().MOKD.TEACHER[key]
            option_cfg.merge_from_list([*opts, "MOKD.TEACHER.WEIGHTS", weights.name])
            try:
                teacher = build_teacher(option_cfg)
            except ValueError as error:
                result[name] = {"error": str(error)}
                continue
            view = teacher.view(batch, model.input_format)
            teacher.wait(view)
            if name == "plain":
                plain = view.features
            differences = [((view.features[k] - x) / x.std()).abs().max() for k, x in plain.items()]
            result[name] = {"difference": max(differences).item()}

            def run(teacher=teacher):
                model.teacher = teacher
                step()

            alone[name] = lambda teacher=teacher: teacher.view(batch, model.input_format)
            whole[name] = run
    for steps, prefix in ((alone, ""), (whole, "step_")):
        seconds = time_rounds(steps, rounds, model.device)
        for name, values in seconds.items():
            ratios = [a / b for a, b in zip(values, seconds["plain"])]
            result[name][f"{prefix}seconds"] = statistics.median(values)
            result[name][f"{prefix}vs_plain"] = statistics.median(ratios)
    return result


def print_once(*values):
    if comm.is_main_process():
        print(*values)


def print_teachers(result):
    columns = f"{'seconds':>8} {'x plain':>8} {'step s':>8} {'x plain':>8} {'difference':>10}"
    print_once(f"{'option':<23} {columns}")
    keys = ("seconds", "vs_plain", "step_seconds", "step_vs_plain")
    for name, entry in result.items():
        if "error" in entry:
            print_once(f"{name:<23} {entry['error']}")
            continue
        numbers = " ".join(f"{entry[key]:8.3f}" for key in keys)
        print_once(f"{name:<23} {numbers} {entry['difference']:10.2e}")


def _stepper(trainer):
    trainer.iter = 0

    def step():
        trainer.iter += 1
        trainer.run_step()

    return step


def torchjd_step(model, batch, optimizer, no_boundary):
    """TorchJD's multi-task backward, with its defaults, at the student's features; min-norm."""
    from torchjd.aggregation import MGDA
    from torchjd.autojac import mtl_backward

    aggregator = MGDA()
    shared = [p for p in model.student.backbone.parameters() if p.requires_grad]
    is_shared = {id(p) for p in shared}
    head = [p for p in model.student.parameters() if p.requires_grad and id(p) not in is_shared]
    tasks_params = [head, list(model.projectors.parameters())]
    with_aggregator = "aggregator" in inspect.signature(mtl_backward).parameters

    def step():
        objectives = model(batch)
        losses = [sum(parts.values()) for parts in objectives.values()]
        optimizer.zero_grad()
        options = {"tasks_params": tasks_params, "shared_params": shared}
        features = [f for f in no_boundary.features if f.requires_grad]
        if with_aggregator:
            mtl_backward(losses, features, aggregator, **options)
        else:
            from torchjd.autojac import jac_to_grad

            mtl_backward(losses, features, **options)
            jac_to_grad(shared, aggregator)
        for parts in objectives.values():  # as Detectron2 reads them for its log
            for name, loss in parts.items():
                get_event_storage().put_scalar(name, loss.item())
        optimizer.step()

    return step


def resident_bytes(variant, model):
    """What a variant keeps between two steps: weights, buffers and the optimizer's state."""
    if variant == "student":
        modules = [model.student]
    elif variant == "teacher_backbone":
        modules = [model.teacher.model]
    else:
        modules = [model, model.teacher.model]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    if variant != "teacher_backbone":
        momentum = [p for p in modules[0].parameters() if p.requires_grad]
        tensors += momentum  # one number for each
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
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    now = peak = resident
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def time_rounds(steps, rounds, device):
    """Return {name: seconds of each round}; all steps take turns, after two runs to warm up."""

    def synchronise():
        if device.type == "cuda":
            torch.cuda.synchronize()
        comm.synchronize()

    seconds = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            synchronise()
            start = time.perf_counter()
            step()
            synchronise()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(model, steps, rounds, device):
    """Return {variant: {seconds, spread, peak_bytes} or {error}} and the seconds of each round."""
    seconds = {variant: [] for variant, step in steps.items() if callable(step)}
    result = {v: {"error": step} for v, step in steps.items() if not callable(step)}
    for variant in list(seconds):
        try:
            steps[variant]()  # first runs allocate, choose kernels, compile
        except (RuntimeError, NotImplementedError) as error:
            # Nothing to compare with; or other processes that would wait for this one.
            if variant == "fixed" or comm.get_world_size() > 1:
                raise
            result[variant] = {"error": f"{type(error).__name__}: {error}"}
            del seconds[variant]
    seconds = time_rounds({v: steps[v] for v in seconds}, rounds, device)
    for variant, values in seconds.items():
        for parameter in (*model.parameters(), *model.student.parameters()):
            parameter.grad = None
        peak = peak_bytes(steps[variant], device, resident_bytes(variant, model))
        low, median, high = statistics.quantiles(values, n=4)
        result[variant] = {"seconds": median, "quartiles": [low, high], "peak_bytes": peak}
    return result, seconds


def compare(variants, seconds):
    """Add the ratios to ``fixed``, and return that of ``fixed`` to its two parts."""

    def ratio(of, to):
        return statistics.median(a / b for a, b in zip(of, to))

    for name, entry in variants.items():
        if "error" not in entry:
            entry["vs_fixed"] = ratio(seconds[name], seconds["fixed"])
            entry["memory_vs_fixed"] = entry["peak_bytes"] / variants["fixed"]["peak_bytes"]
    ratios = {}
    if "teacher_backbone" in seconds:
        parts = [a + b for a, b in zip(seconds["student"], seconds["teacher_backbone"])]
        ratios["fixed / (student + teacher_backbone)"] = ratio(seconds["fixed"], parts)
    if {"torchjd", "features"} <= set(seconds):
        ratios["torchjd / features"] = ratio(seconds["torchjd"], seconds["features"])
    return ratios


def machine(device):
    cpu = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    return {
        "device": name,
        "processes": comm.get_world_size(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def argument_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="a config with MOKD.ENABLED True")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=4, help="images a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="(%(default)s)")
    parser.add_argument(
        "--variants", nargs="+", default=VARIANTS, help=f"of {', '.join(VARIANTS)} (all of them)"
    )
    parser.add_argument(
        "--teacher-options", action="store_true", help="compare those of the teacher"
    )
    parser.add_argument("--output", default="", help="JSON file to write")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides KEY VALUE ...")
    # One process, unless torchrun has started several.
    parser.set_defaults(num_gpus=1, num_machines=1, machine_rank=0, dist_url=None)
    return parser


def main(args):
    if args.rounds < 2:
        raise ValueError(f"--rounds is {args.rounds}: expected 2 or more.")
    args.variants, overrides = split_overrides(args.variants)
    args.opts = overrides + args.opts
    if unknown := [name for name in args.variants if name not in VARIANTS]:
        raise ValueError(f"--variants has {unknown}: expected some of {', '.join(VARIANTS)}.")
    if args.teacher_options and comm.get_world_size() > 1:
        raise ValueError(
            "--teacher-options compares within one process: start it without torchrun."
        )
    cfg = load_config(args.config_file, args.opts)
    if not cfg.MOKD.ENABLED:
        raise ValueError(f"--config-file '{args.config_file}' has MOKD.ENABLED False.")
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        print_once("No GPU: MODEL.DEVICE is cpu.")
    seed_all_rng(0)
    model = build(cfg)
    batch = random_batch(cfg, *args.size, args.batch)
    result = {
        "machine": machine(model.device),
        "config": args.config_file,
        "size": list(args.size),
        "batch": args.batch,
        "rounds": args.rounds,
    }
    print_once(f"{result['machine']}; {args.batch} images of {args.size[0]} x {args.size[1]}")
    if args.teacher_options:
        with EventStorage():
            result["teacher_options"] = compare_teachers(cfg, model, batch, args.rounds)
        print_teachers(result["teacher_options"])
    else:
        result |= compare_variants(args, cfg, model, batch)
    if args.output and comm.is_main_process():
        with open(args.output, "w") as f:
            json.dump(result, f, indent=1)
        print_once(args.output)


def compare_variants(args, cfg, model, batch):
    """Return variants, ratios and seconds of rounds, and print them."""
    steps = build_steps(cfg, model, batch)
    wanted = {v: steps[v] for v in VARIANTS if v in {*args.variants, "student", "fixed"}}
    with EventStorage():
        variants, seconds = measure(model, wanted, args.rounds, model.device)
    ratios = compare(variants, seconds)
    columns = f"{'seconds':>8} {'quartiles':>15} {'x fixed':>8} {'MiB':>7} {'x fixed':>8}"
    print_once(f"{'variant':<17} {columns}")
    for name, entry in variants.items():
        if "error" in entry:
            print_once(f"{name:<17} {entry['error']}")
            continue
        low, high = entry["quartiles"]
        print_once(
            f"{name:<17} {entry['seconds']:8.3f} {low:7.3f}-{high:7.3f} {entry['vs_fixed']:8.3f} "
            f"{entry['peak_bytes'] / 2**20:7.0f} {entry['memory_vs_fixed']:8.3f}"
        )
    for name, value in ratios.items():
        print_once(f"{name}: {value:.3f}")
    return {"variants": variants, "ratios": ratios, "seconds_of_rounds": seconds}


if __name__ == "__main__":
    launch(main, argument_parser().parse_args())
