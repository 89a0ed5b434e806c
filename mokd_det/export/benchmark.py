# Copyright (c) The mokd_det authors.
"""What an exported student costs beside its teacher, and beside the same model from scratch."""

import os
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..evaluation.cost import count_parameters, gflops, seconds_of
from .export import export_model
from .exporter import Exporter, ExportOptions
from .images import read_images
from .metadata import Json
from .onnx import load_onnx
from .torchscript import load_torchscript

if TYPE_CHECKING:
    from ..tasks import Task


def check_benchmark(task: "Task", cfg: CfgNode, format: str) -> None:
    """Raise if files of a format do not do the whole work, or a teacher cannot be exported."""
    if format not in ("torchscript", "onnx"):
        raise ValueError(
            f"--benchmark times files of --format torchscript or onnx, not of '{format}'."
        )
    if cfg.MOKD.ENABLED and cfg.MOKD.TEACHER.TORCHSCRIPT.FILE:
        raise ValueError(
            "--benchmark exports the teacher as well, but MOKD.TEACHER.TORCHSCRIPT.FILE gives "
            "features only. Add MOKD.ENABLED False to time the student alone."
        )
    if cfg.MOKD.ENABLED:
        task.teacher_config(cfg)  # whose weights must be there


def benchmark(
    task: "Task",
    cfg: CfgNode,
    exported: Json,
    output_dir: str,
    options: ExportOptions,
    images: Sequence[str] = (),
) -> Json:
    """
    Time an exported student, its source and, if the config distils, its teacher exported likewise,
    on one image at batch 1.

    Args:
        task, cfg, options, images: of the student's export, ``exported`` is its result.
        output_dir: the teacher goes to ``teacher/`` in it.

    Returns:
        ``bytes`` of both files, ``latency`` (see :func:`latencies`; ratios are to the exported
        student), ``threads``, ``device`` and ``scratch`` (see :func:`compare_with_scratch`).
    """
    pictures, _ = read_images(cfg, images, count=1)
    image = task.exporter(cfg).to_tensor(pictures[0])
    sizes = {"student": exported["bytes"]}
    runs = {"student": _runner(task.exporter(cfg), exported, image)}
    if cfg.MOKD.ENABLED:
        teacher_cfg = task.teacher_config_at_students_size(cfg)
        teacher_task = task.of_teacher(teacher_cfg)
        folder = os.path.join(output_dir, "teacher")
        teacher = export_model(
            teacher_task, teacher_cfg, folder, options, images, "MOKD.TEACHER.WEIGHTS"
        )
        if not teacher["parity"]["passed"]:
            raise ValueError(
                f"--benchmark: the exported teacher differs from its source: {teacher['parity']}. "
                "Try the other --method, or MOKD.ENABLED False to time the student alone."
            )
        sizes["teacher"] = teacher["bytes"]
        exporter = teacher_task.exporter(teacher_cfg)
        runs["teacher"] = _runner(exporter, teacher, exporter.to_tensor(pictures[0]))
    return {
        "bytes": sizes,
        "latency": latencies(runs),
        "device": cfg.MODEL.DEVICE,
        "threads": torch.get_num_threads(),
        "image": list(image.shape),
        "scratch": compare_with_scratch(task, cfg, image),
    }


def _runner(exporter: Exporter, exported: Json, image: Tensor) -> Callable[[], Any]:
    given = exporter.exported_input(image)
    if exported["format"] == "onnx":
        run = load_onnx(exported["file"])
    else:
        device = exporter.cfg.MODEL.DEVICE
        run, given = load_torchscript(exported["file"], device)[0], given.to(device)
    return lambda: run(given)


def format_benchmark(result: Json) -> str:
    """Return the results of :func:`benchmark` as Markdown."""
    latency, scratch = result["latency"], result["scratch"]
    lines = [
        f"Batch 1, image {result['image']}, {result['device']}, {result['threads']} threads:",
        "| exported | ms an image | MiB |",
        "|---|---|---|",
    ]
    for name, size in result["bytes"].items():
        lines.append(f"| {name} | {1e3 * latency[f'{name}_seconds']:.1f} | {size / 2**20:.1f} |")
    if "teacher" in result["bytes"]:
        ratio = result["bytes"]["teacher"] / result["bytes"]["student"]
        lines.append(f"| teacher / student | {latency['teacher_ratio']:.2f} | {ratio:.2f} |")
    flops = [f"{value:.4g}" for value in scratch["gflops"]]
    lines += [
        "The student (eager) beside the model of its stock config without distillation:",
        f"  state-dict keys and shapes: {'equal' if scratch['keys_equal'] else 'DIFFERENT'}",
        f"  parameters: {scratch['parameters'][0]:,} and {scratch['parameters'][1]:,}",
        f"  GFLOPs (multiply-adds): {flops[0]} and {flops[1]}",
        f"  ms an image: {1e3 * scratch['eager_student_seconds']:.1f} and "
        f"{1e3 * scratch['eager_scratch_seconds']:.1f} "
        f"(ratio {scratch['eager_scratch_ratio']:.3f})",
    ]
    return "\n".join(lines)


@torch.no_grad()
def latencies(
    models: dict[str, Callable[[], Any]], rounds: int = 15, warm_up: int = 3
) -> dict[str, float]:
    """
    Time models in turns, so that whatever else the machine does hits all of them. TorchScript
    optimises in the first runs, those of ``warm_up``.

    Returns:
        ``{name}_seconds``, medians; and ``{name}_ratio`` to the first, the median of the ratios
        within a round, for the others.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(warm_up + rounds):
        for name, run in models.items():
            seconds[name].append(seconds_of(run))
    seconds = {name: times[warm_up:] for name, times in seconds.items()}
    first, *others = seconds
    result = {f"{name}_seconds": statistics.median(times) for name, times in seconds.items()}
    for name in others:
        ratios = [theirs / mine for mine, theirs in zip(seconds[first], seconds[name])]
        result[f"{name}_ratio"] = statistics.median(ratios)
    return result


@torch.no_grad()
def compare_with_scratch(task: "Task", cfg: CfgNode, image: Tensor) -> Json:
    """
    Show that distillation leaves nothing in the student: beside the model that Detectron2 builds
    from the student's stock config, without MOKD, as training from scratch does. That model gets
    the student's weights, as the work of an R-CNN's heads depends on what it finds. The image is
    (3, H, W) uint8, as the model takes it.

    Returns:
        ``keys_equal`` (bool, with shapes), ``parameters`` and ``gflops`` of both, and
        ``eager_student_seconds``, ``eager_scratch_seconds``, ``eager_scratch_ratio``.
    """
    student = task.load_trained(cfg)
    scratch_cfg = task.stock_config(task.untrained_config(cfg))
    scratch_cfg.MODEL.WEIGHTS = ""
    scratch = task.build_student(scratch_cfg).eval()
    both = (student, scratch)
    shapes = [{k: tuple(v.shape) for k, v in model.state_dict().items()} for model in both]
    task.stock_module(scratch).load_state_dict(task.stock_module(student).state_dict(), strict=True)
    inputs = task.exporter(cfg).eager_input(image)
    timed = {"eager_student": lambda: student(inputs), "eager_scratch": lambda: scratch(inputs)}
    return {
        "keys_equal": shapes[0] == shapes[1],
        "parameters": [count_parameters(model) for model in both],
        "gflops": [gflops(model, inputs) for model in both],
        **latencies(timed),
    }
