# Copyright (c) The mokd_det authors.
"""Detectors and classifiers as ONNX."""

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .detector import TraceableDetector, output_names
from .metadata import METADATA_FILE, Json
from .onnx_nms import onnx_nms

OPSET = 17  # the newest that torch's tracing exporter writes in full


def check_onnx(model: nn.Module) -> None:
    """Raise ImportError without onnx or onnxruntime, ValueError if ONNX cannot hold the model."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "--format onnx needs onnx and onnxruntime: pip install -e '.[onnx]' in the checkout "
            f"({error})"
        ) from error
    if hasattr(model, "backbone") and "keypoints" in output_names(model):
        raise ValueError(
            "--format onnx: Keypoint R-CNN finds keypoints in a loop that torch's exporter cannot "
            "write. Use --format torchscript."
        )


def export_onnx(
    model: nn.Module, image: Tensor, path: str, metadata: Json, names: Sequence[str] = ()
) -> None:
    """
    Write a detector or a deployed classifier, in eval mode; the image is an example input.
    ``names``: of the outputs of a detector that returns a tuple of them.
    """
    import onnx

    if names or hasattr(model, "backbone"):  # a detector
        traceable = model
        if not names:
            traceable = TraceableDetector(model, as_tuple=True).eval()
            names = output_names(model)
        input_name = "image"
        axes = {"image": {1: "height", 2: "width"}, **{name: {0: "detections"} for name in names}}
    else:
        traceable, input_name, names = model, "images", ["logits"]
        sides = {2: "height", 3: "width"} if metadata["image_size"] == "any" else {}
        axes = {"images": {0: "batch", **sides}, "logits": {0: "batch"}}
    # torch's newer exporter (dynamo=True) fails at Detectron2's lists and asserts, so this is the
    # one that traces. It prints the graph when it fails.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), onnx_nms():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            traceable,
            (image.to(torch.float32),),
            path,
            input_names=[input_name],
            output_names=names,
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    file = onnx.load(path)
    entry = file.metadata_props.add()
    entry.key, entry.value = METADATA_FILE, json.dumps(metadata)
    onnx.save(file, path)


def load_onnx(path: str) -> Callable[[Tensor], Any]:
    """
    Return a function that runs the file with onnxruntime on the CPU, from an image to dict[str,
    Tensor] (a detector) or from images to logits.
    """
    import onnxruntime

    # Its warnings on names that the exporter left over say nothing.
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    input_name = session.get_inputs()[0].name

    def run(image: Tensor) -> Any:
        found = session.run(None, {input_name: image.to(torch.float32).cpu().numpy()})
        tensors = [torch.from_numpy(x) for x in found]
        return tensors[0] if names == ["logits"] else dict(zip(names, tensors))

    return run
