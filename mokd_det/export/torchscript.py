# Copyright (c) The mokd_det authors.
"""Detectors and classifiers as TorchScript, by tracing or scripting."""

import contextlib
import copy
import json
import types
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from detectron2.export.torchscript import scripting_with_instances
from detectron2.modeling.roi_heads import cascade_rcnn
from torch import Tensor, nn
from torchvision.ops import boxes

from . import detector
from .metadata import METADATA_FILE, Json


def trace(model: nn.Module, image: Tensor) -> torch.jit.ScriptModule:
    """Trace a detector in eval mode, best on an image with detections, so that every part runs."""
    with _scripted_nms(), _without_gradient_scaling():
        traced = _trace(detector.TraceableDetector(model).eval(), image)
        return _script(detector.TracedDetector(traced).eval())


def trace_network(model: nn.Module, images: Tensor) -> torch.jit.ScriptModule:
    """As :func:`trace`, of a deployed classifier."""
    # A traced function keeps the type of its example; images come as uint8 too.
    return _script(_AnyType(_trace(model, images)).eval())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """
    Without warnings of tensors that become Python numbers or constants: what a file computes is
    compared with the model in any case.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
@_quiet()
def _trace(model: nn.Module, example: Tensor) -> Any:
    return torch.jit.trace(model, (example.to(torch.float32),), strict=False, check_trace=False)


@_quiet()
def _script(module: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.script(module)


def _scripted_nms() -> Any:
    """
    torchvision's NMS by class (or level) takes another way for more than 1000 boxes, with other
    rounding, but never while tracing. Scripted, the choice stays in the trace.
    """
    return mock.patch.object(boxes, "batched_nms", torch.jit.script(boxes.batched_nms))


def _without_gradient_scaling() -> Any:
    """
    Cascade R-CNN of Detectron2 0.6 scales gradients in inference too, by Python code that an
    archive cannot hold and that leaves values as they are. Later versions do it in training only.
    """
    no_scaling = types.SimpleNamespace(apply=lambda features, scale: features)
    return mock.patch.object(cascade_rcnn, "_ScaleGradient", no_scaling)


class _AnyType(nn.Module):
    def __init__(self, traced):
        super().__init__()
        self.network = traced

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.to(torch.float32))


def script(model: nn.Module) -> torch.jit.ScriptModule:
    """Script a detector in eval mode; ValueError: TorchScript cannot compile it."""
    detector.check_scripting(model)
    with _refusals_explained():
        model = _with_scripted_graphs(model)
        fields = detector.instances_fields(model)
        return scripting_with_instances(detector.ScriptableDetector(model).eval(), fields)


def script_network(model: nn.Module) -> torch.jit.ScriptModule:
    """As :func:`script`, of a deployed classifier."""
    with _refusals_explained():
        return torch.jit.script(_with_scripted_graphs(model))


@contextlib.contextmanager
def _refusals_explained() -> Iterator[None]:
    try:
        with _quiet():
            yield
    except (RuntimeError, TypeError, AttributeError, ValueError, NotImplementedError) as error:
        # torch.jit's own errors derive from these, one for each kind of Python it does not know.
        raise ValueError(
            f"--method scripting: TorchScript cannot compile this model: {str(error).strip()}\n"
            "Use --method tracing."
        ) from error


def _with_scripted_graphs(model: nn.Module) -> nn.Module:
    """
    Return a copy in which each torch.fx graph (the body of a torchvision backbone) is scripted for
    itself: as parts of other modules, their layers would be scripted in training mode.
    """
    graphs = [name for name, m in model.named_modules() if isinstance(m, torch.fx.GraphModule)]
    if not graphs:
        return model
    model = copy.deepcopy(model).eval()
    for name in graphs:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, torch.jit.script(model.get_submodule(name)))
    return model


def freeze(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Make weights of a traced or scripted module constants, with BatchNorm in convolutions."""
    methods = [name for name in ("batch", "paste_masks") if hasattr(module, name)]
    return torch.jit.freeze(module, preserved_attrs=methods)


def save_torchscript(module: torch.jit.ScriptModule, path: str, metadata: Json) -> None:
    """Write the archive with ``metadata`` as JSON inside."""
    torch.jit.save(module, path, _extra_files={METADATA_FILE: json.dumps(metadata, indent=2)})


def load_torchscript(
    path: str, device: str | torch.device = "cpu"
) -> tuple[torch.jit.ScriptModule, Json]:
    """
    Return the module of a file of :func:`save_torchscript`, on a device, and its metadata;
    ValueError: a detector that was traced on another kind of device.
    """
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(f"/extra/{METADATA_FILE}"))
        metadata = json.loads(archive.read(name))
    traced_on, device = metadata.get("traced_on"), torch.device(device)
    if traced_on and traced_on != device.type:
        raise ValueError(
            f"{path} was traced on '{traced_on}' and cannot run on '{device}': export it with "
            f"MODEL.DEVICE {device.type}, or with --method scripting."
        )
    # A trace calculates with sizes of images on the CPU, wherever its weights are: each of its
    # constants stays where it was.
    module = torch.jit.load(path, map_location=None if traced_on else device)
    return module, metadata
