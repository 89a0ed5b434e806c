# Copyright (c) The mokd_det authors.
"""What an exported student costs beside its teacher, and a distilled one beside its twin."""

import os
import statistics
import time

import torch
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis

from ..config import stock_config
from ..data.classification import Batch
from ..evaluation import count_parameters
from ..modeling import (
    is_classifier,
    load_trained_model,
    stock_module,
    teacher_config,
    teacher_images,
    without_initial_weights,
)
from .export import export_model
from .images import read_images, to_tensor
from .onnx import load_onnx
from .torchscript import load_torchscript

__all__ = ["benchmark", "check_benchmark", "compare_with_twin", "format_benchmark", "latencies"]


def check_benchmark(cfg, format):
    """
    Raises:
        ValueError, FileNotFoundError: a format whose files do no whole work, or the config's
            teacher cannot be exported.
    """
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
        teacher_config(cfg)  # whose weights must be there


def benchmark(cfg, exported, output_dir, method, options):
    """
    Time an exported student, its source and, if the config distils, its teacher exported likewise,
    on one image at batch 1.

    Args:
        cfg (CfgNode): the student's.
        exported (dict): of :func:`mokd_det.export.export.export_model`.
        output_dir (str): the teacher goes to ``teacher/`` in it.
        method (str): of the export.
        options (dict): its other options.

    Returns:
        dict: ``bytes`` of both files, ``latency`` (see :func:`latencies`; ratios are to the
        exported student), ``threads``, ``device`` and ``twin`` (see :func:`compare_with_twin`).
    """
    format = exported["format"]
    pictures, _ = read_images(cfg, options["images"], count=1)
    image = to_tensor(cfg, pictures[0])
    sizes = {"student": exported["bytes"]}
    runs = {"student": _runner(exported["file"], format, image, cfg)}
    if cfg.MOKD.ENABLED:
        teacher_cfg = teacher_config(cfg)
        teacher_cfg.DATASETS = cfg.DATASETS
        teacher_cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MIN_SIZE_TEST  # the same work for both
        teacher_cfg.INPUT.MAX_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST
        teacher_cfg.INPUT.CLASSIFICATION = teacher_images(cfg)
        folder = os.path.join(output_dir, "teacher")
        teacher = export_model(
            teacher_cfg, folder, format, method, option="MOKD.TEACHER.WEIGHTS", **options
        )
        if not teacher["parity"]["passed"]:
            raise ValueError(
                f"--benchmark: the exported teacher differs from its source: {teacher['parity']}. "
                "Try the other --method, or MOKD.ENABLED False to time the student alone."
            )
        sizes["teacher"] = teacher["bytes"]
        theirs = to_tensor(teacher_cfg, pictures[0])
        runs["teacher"] = _runner(teacher["file"], format, theirs, teacher_cfg)
    return {
        "bytes": sizes,
        "latency": latencies(runs),
        "device": cfg.MODEL.DEVICE,
        "threads": torch.get_num_threads(),
        "image": list(image.shape),
        "twin": compare_with_twin(cfg, image),
    }


def _runner(path, format, image, cfg):
    if format == "onnx":
        run = load_onnx(path)
    else:
        run, _ = load_torchscript(path, cfg.MODEL.DEVICE)
        image = image.to(cfg.MODEL.DEVICE)
    given = image[None] if is_classifier(cfg) else image
    return lambda: run(given)


def format_benchmark(result):
    """Return the results of :func:`benchmark` as Markdown."""
    latency, twin = result["latency"], result["twin"]
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
    flops = [f"{value:.4g}" for value in twin["gflops"]]
    lines += [
        "The student (eager) beside the model of its stock config without distillation:",
        f"  state-dict keys and shapes: {'equal' if twin['keys_equal'] else 'DIFFERENT'}",
        f"  parameters: {twin['parameters'][0]:,} and {twin['parameters'][1]:,}",
        f"  GFLOPs (multiply-adds): {flops[0]} and {flops[1]}",
        f"  ms an image: {1e3 * twin['eager_student_seconds']:.1f} and "
        f"{1e3 * twin['eager_twin_seconds']:.1f} (ratio {twin['eager_twin_ratio']:.3f})",
    ]
    return "\n".join(lines)


@torch.no_grad()
def latencies(models, rounds=15, warm_up=3):
    """
    Time models in turns, so that whatever else the machine does hits all of them.

    Args:
        models (dict[str, callable]): name -> function without arguments that runs the model once.
        rounds (int): timed runs of each.
        warm_up (int): runs before, in which TorchScript optimises.

    Returns:
        dict[str, float]: ``{name}_seconds``, medians; and ``{name}_ratio`` to the first, the median
        of the ratios within a round, for the others.
    """
    seconds = {name: [] for name in models}
    for i in range(warm_up + rounds):
        for name, run in models.items():
            _synchronise()
            start = time.perf_counter()
            run()
            _synchronise()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    first, *others = seconds
    result = {f"{name}_seconds": statistics.median(times) for name, times in seconds.items()}
    for name in others:
        ratios = [theirs / mine for mine, theirs in zip(seconds[first], seconds[name])]
        result[f"{name}_ratio"] = statistics.median(ratios)
    return result


def _synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def compare_with_twin(cfg, image):
    """
    Show that distillation leaves nothing in the student: beside the model that Detectron2 builds
    from the student's stock config, without MOKD, as training from scratch does.

    The twin gets the student's weights, as the work of an R-CNN's heads depends on what it finds.

    Args:
        cfg (CfgNode): the student's, with its trained ``MODEL.WEIGHTS``.
        image (Tensor): (3, H, W) uint8, as the model takes it.

    Returns:
        dict: ``keys_equal`` (bool, with shapes), ``parameters`` and ``gflops`` (multiply-adds, as
        fvcore counts them), of (student, twin), and ``eager_student_seconds``,
        ``eager_twin_seconds``, ``eager_twin_ratio``.
    """
    student = load_trained_model(cfg)
    twin_cfg = stock_config(cfg)
    if is_classifier(cfg):
        twin_cfg = without_initial_weights(twin_cfg)
    twin_cfg.MODEL.WEIGHTS = ""
    if "TORCHVISION" in twin_cfg.MODEL:
        twin_cfg.MODEL.TORCHVISION.WEIGHTS = ""
    twin = build_model(twin_cfg).eval()
    shapes = [
        {key: tuple(value.shape) for key, value in model.state_dict().items()}
        for model in (student, twin)
    ]
    stock_module(twin).load_state_dict(stock_module(student).state_dict(), strict=True)
    if is_classifier(cfg):
        inputs = Batch(image[None], torch.zeros(1, dtype=torch.long))
    else:
        inputs = [{"image": image, "height": image.shape[1], "width": image.shape[2]}]
    both = (student, twin)
    timed = {"eager_student": lambda: student(inputs), "eager_twin": lambda: twin(inputs)}
    return {
        "keys_equal": shapes[0] == shapes[1],
        "parameters": [count_parameters(model) for model in both],
        "gflops": [_gflops(model, inputs) for model in both],
        **latencies(timed),
    }


def _gflops(model, inputs):
    analysis = FlopCountAnalysis(model, inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.total() / 1e9
