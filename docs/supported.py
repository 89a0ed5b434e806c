#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Write the table of docs/torchvision_detectors.md: every model is built, without memory for its
weights, and the code that reads and exports it is asked. Needs the extra "onnx".

Example:
  python docs/supported.py
"""

import argparse
from pathlib import Path

import mokd_det.compat  # noqa: F401  (first: patches Detectron2 where it needs it)
import torch
from detectron2.modeling import build_model

from mokd_det.command_line import add_debug, errors_as_messages
from mokd_det.config import load_config
from mokd_det.engine import validate
from mokd_det.export import ExportOptions
from mokd_det.modeling import detector_names
from mokd_det.readers import build_box_reader, feature_shapes
from mokd_det.readers.anchors import stock_rpn

PAGE = Path(__file__).resolve().parent / "torchvision_detectors.md"
BEGIN = "<!-- Written by `python docs/supported.py`; a test holds it to the code. -->\n"
END = "<!-- End. -->\n"
HEAD = ("model", "student", "teacher", "features: strides", "outputs", "script", "ONNX")


def config_of(name: str, teacher: str):
    """Return the config of a student, to be built without weights."""
    opts = ["MODEL.TORCHVISION_DETECTOR.NAME", name, "MODEL.DEVICE", "meta"]
    opts += ["MODEL.MASK_ON", name.startswith("maskrcnn")]
    opts += ["MODEL.KEYPOINT_ON", name.startswith("keypointrcnn")]
    opts += ["MOKD.ENABLED", True, "MOKD.OBJECTIVES", ["features", "teacher_head", "outputs"]]
    opts += ["MOKD.TEACHER.DETECTOR", teacher, "MOKD.TEACHER.WEIGHTS", "DEFAULT"]
    return load_config("Base-TorchvisionDetector.yaml", opts)


def answer(ask, *args) -> str:
    """Return "yes", or "no" where the code refuses."""
    try:
        ask(*args)
    except ValueError:
        return "no"
    return "yes"


def row_of(name: str) -> list[str]:
    cfg = config_of(name, "fasterrcnn_resnet50_fpn_v2")
    task = validate(cfg)
    with torch.device("meta"):
        model = build_model(cfg)
        strides = ", ".join(str(shape.stride) for shape in feature_shapes(model).values())
        student = answer(can_be_student, task, cfg, model)
        teacher = answer(can_be_teacher, name, model)
    outputs = "classes, boxes, RPN" if stock_rpn(model) else "classes, boxes"
    script = ExportOptions(format="torchscript", method="scripting")
    files = [
        answer(task.exporter(cfg).check, model, options)
        for options in (script, ExportOptions(format="onnx"))
    ]
    return [f"`{name}`", student, teacher, strides, outputs, *files]


def can_be_student(task, cfg, model):
    task.check_student(cfg, model)
    build_box_reader(model, "student")


def can_be_teacher(name, model):
    validate(config_of("retinanet_resnet50_fpn", name))
    build_box_reader(model, "teacher")


def table() -> str:
    rows = [list(HEAD), ["---"] * len(HEAD), *map(row_of, detector_names())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def parts_of_page() -> tuple[str, str, str]:
    """Return the page's text before the table, the table, and what follows."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    written, _, after = rest.partition(END)
    return before, written, after


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_debug(parser)
    with errors_as_messages(parser.parse_args().debug):
        before, _, after = parts_of_page()
        PAGE.write_text(f"{before}{BEGIN}{table()}{END}{after}")
    print(PAGE.name)


if __name__ == "__main__":
    main()
