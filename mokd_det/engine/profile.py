# Copyright (c) The mokd_det authors.
"""Where the time of a training step goes, part by part."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

PREFIX = "part: "
BALANCING, OPTIMIZER, REST = "balancing", "optimizer", "losses, sampling, boxes and the rest"
# Names of heads, as Detectron2 and torchvision have them, and what they are called here.
HEADS = {
    "proposal_generator.rpn_head": "RPN head",
    "network.rpn.head": "RPN head",
    "roi_heads.box_pooler": "box pooler",
    "roi_heads.box_head": "box head",
    "roi_heads.box_predictor": "box head",
    "roi_heads.mask_head": "mask head",
    "network.roi_heads.box_roi_pool": "box pooler",
    "network.roi_heads.box_head": "box head",
    "network.roi_heads.box_predictor": "box head",
    "head": "dense head",
    "network.head": "dense head",
}


def parts_of(model: Any) -> dict[str, list[nn.Module]]:
    """Return the parts of a distillation model whose cost is told apart, by name."""
    parts: dict[str, list[Any]] = defaultdict(list)
    for who, side in (("student", model.student), ("teacher", model.teacher.model)):
        modules: dict[str, Any] = dict(side.named_modules())
        backbone = modules["backbone"] if "backbone" in modules else modules["network"]
        bottom_up = getattr(backbone, "bottom_up", getattr(backbone, "body", None))
        if bottom_up is None:
            parts[f"{who}: backbone"].append(backbone)
        else:
            parts[f"{who}: backbone"].append(bottom_up)
            parts[f"{who}: FPN"].append(backbone)
        for name, part in HEADS.items():
            if name in modules:
                parts[f"{who}: {part}"].append(modules[name])
    for name, objective in model.objectives.items():
        parts[f"{name}: losses"].append(objective)
        if (projectors := getattr(objective, "projectors", None)) is not None:
            parts[f"{name}: projectors"] += projectors.values()
    return dict(parts)


def profile_steps(
    step: Callable[[], Any], parts: Mapping[str, list[nn.Module]], count: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """
    Return {part: {"seconds", "gflops"}} of a step, the mean of ``count``, and the rest under names
    of its own; backward passes belong to the part whose forward pass made them. FLOPs are those of
    convolutions and matrix products in forward passes, as torch's profiler counts them.
    """
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with _ranges(parts), profile(activities=activities, with_flops=True) as profiler:
        for _ in range(count):
            step()
    events = [event for event in profiler.events() if not event.is_async]
    part_of = {event: _part_of(event) for event in events}
    # Of the forward operation with a number, the backward one has the same.
    forward = {e.sequence_nr: p for e, p in part_of.items() if e.sequence_nr >= 0 and p}
    result: dict[str, dict[str, float]] = defaultdict(lambda: {"seconds": 0.0, "gflops": 0.0})
    for event, part in part_of.items():
        entry = result[part or _backward_part(event, forward)]
        on_gpu = device.type == "cuda"
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        entry["seconds"] += time / 1e6 / count
        entry["gflops"] += (event.flops or 0) / 1e9 / count
    return dict(sorted(result.items(), key=lambda item: -item[1]["seconds"]))


@contextlib.contextmanager
def _ranges(parts: Mapping[str, list[nn.Module]]) -> Iterator[None]:
    """While it is open, every run of these modules is a named range of the profiler's."""
    with contextlib.ExitStack() as stack:
        for name, modules in parts.items():
            for module in modules:
                open_ones: list[Any] = []

                def begin(*_: Any, name: str = name, open_ones: list = open_ones) -> None:
                    open_ones.append(record_function(PREFIX + name))
                    open_ones[-1].__enter__()

                def end(*_: Any, open_ones: list = open_ones) -> None:
                    open_ones.pop().__exit__(None, None, None)

                stack.callback(module.register_forward_pre_hook(begin).remove)
                stack.callback(module.register_forward_hook(end).remove)
        yield


def _ancestors(event: FunctionEvent) -> Iterator[FunctionEvent]:
    found: FunctionEvent | None = event
    while found is not None:
        yield found
        found = found.cpu_parent


def _part_of(event: FunctionEvent) -> str:
    """The innermost part that an event is in, and the objective that runs it; "" if in none."""
    names = [e.name[len(PREFIX) :] for e in _ancestors(event) if e.name.startswith(PREFIX)]
    if not names:
        return ""
    runs = next((n.split(":")[0] for n in names if n.endswith(": losses")), "")
    inner = names[0]
    return f"{runs}: {inner.replace(': ', ' ')}" if runs and not inner.startswith(runs) else inner


def _backward_part(event: FunctionEvent, forward: Mapping[int, str]) -> str:
    for parent in _ancestors(event):
        if "_SplitBackward" in parent.name:
            return BALANCING
        if parent.name.startswith("Optimizer."):
            return OPTIMIZER
        if parent.sequence_nr in forward:
            return forward[parent.sequence_nr]
    return REST
