# Copyright (c) The mokd_det authors.
"""What every teacher has in common: it is only ever run, and as fast as the options say."""

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..speed import check_backend, computes_bfloat16

logger = logging.getLogger(__name__)

AUTO = "auto"
MOST_DIFFERENCE = 0.05  # of features in bfloat16, in standard deviations, for "auto"
PRECISIONS = {
    AUTO: None,  # replaced
    "": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclasses.dataclass
class TeacherOutputs:
    """
    What a teacher says about a batch, without gradients.

    Attributes:
        features: by name: of a detector's backbone (N, C, H / stride, W / stride); of a classifier
            what is tapped.
        answers: see :meth:`remember`.
        batch: what the student is to see with it, as its task prepared it.
    """

    features: dict[str, Tensor]
    answers: dict[Any, Any] = dataclasses.field(default_factory=dict, kw_only=True)
    batch: Any = dataclasses.field(default=None, kw_only=True)

    def remember(self, question: Any, ask: Callable[[], Any]) -> Any:
        """Return ``ask()``; for the same question again what it returned the first time."""
        if question not in self.answers:
            self.answers[question] = ask()
        return self.answers[question]


class Teacher:
    """
    A model that is only ever run, in eval mode and without gradients.

    Deliberately no ``nn.Module``: whatever holds a teacher shows none of it in ``parameters()``,
    ``state_dict()``, the optimizer or DistributedDataParallel.
    """

    def __init__(
        self,
        model: nn.Module,
        body: nn.Module,
        look: Callable[[], Any] | None = None,
        *,
        precision: str = "",
        channels_last: bool | None = False,
        compile: str = "",
        inference_mode: bool = False,
        stream: bool = False,
    ):
        """
        ``body`` is the part of the model that is compiled and whose memory format changes; options
        are those of ``MOKD.TEACHER``. ``look``: its features of some image, for "auto"; None: that
        is float32. ValueError for an option that this model or machine does not have.
        """
        # Any: what else it has is its task's to know, and Detectron2 has no types.
        self.model: Any = model.eval().requires_grad_(False)
        if precision not in PRECISIONS:
            raise ValueError(
                f"MOKD.TEACHER.PRECISION is '{precision}': expected one of "
                f"{', '.join(map(repr, PRECISIONS))}."
            )
        # A frozen TorchScript module has neither parameters nor buffers, but its detector has.
        device = next(itertools.chain(model.parameters(), model.buffers())).device
        if precision == AUTO:
            precision = _fast_precision(device, look)
            channels_last = precision != "" if channels_last is None else channels_last
        self.precision = PRECISIONS[precision]
        self._autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext
        if self.precision is not None:
            enabled = self.precision != torch.float32
            dtype = self.precision if enabled else None
            self._autocast = functools.partial(torch.autocast, device.type, dtype, enabled=enabled)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            body.to(memory_format=torch.channels_last)
        if compile:
            check_backend(compile, "MOKD.TEACHER.COMPILE")
            body.forward = torch.compile(body.forward, backend=compile)
        self._inference_mode = inference_mode
        if stream and device.type != "cuda":
            raise ValueError(
                f"MOKD.TEACHER.STREAM True needs a GPU, but MODEL.DEVICE is '{device}': set it to "
                "False."
            )
        self._stream = torch.cuda.Stream(device) if stream else None

    def run(self, batch: Any, input_format: str) -> TeacherOutputs:
        """
        Return outputs under the teacher's own preprocessing for a batch as the student takes it,
        whose images are "RGB" or "BGR". On a stream of its own they are ready after :meth:`wait`.
        """
        raise NotImplementedError

    def wait(self, outputs: TeacherOutputs) -> None:
        """Make the current CUDA stream wait for what :meth:`run` returned."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)  # may not be the current GPU's
            current.wait_stream(self._stream)
            for tensor in _tensors(outputs):
                tensor.record_stream(current)

    def read(self, function: Callable[..., Any], *args: Any) -> Any:
        """
        Return ``function(*args)`` of a part of the teacher, run as the teacher is, but with
        gradients for what is given to it. Its own parameters and buffers stay as they are.
        """
        self.model.eval()
        with self._autocast():
            return function(*args)

    def _run_beside(self, function: Callable[..., Any], *args: Any) -> Any:
        """As :meth:`_run`, on the teacher's own stream if it has one."""
        if self._stream is None:
            return self._run(function, *args)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            return self._run(function, *args)

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        # Again at every step: nothing that walks over modules may have left it in train mode.
        self.model.eval()
        mode = torch.inference_mode if self._inference_mode else torch.no_grad
        with mode(), self._autocast():
            result = function(*args)
        # Tensors of inference mode cannot be part of a backward pass, not even as constants.
        return _changed(result, torch.clone) if self._inference_mode else result


def speed_options(cfg: CfgNode) -> dict[str, Any]:
    """Return those keyword arguments of :class:`Teacher` that ``cfg.MOKD.TEACHER`` has."""
    names = ("precision", "channels_last", "compile", "inference_mode", "stream")
    options = {name: cfg.MOKD.TEACHER[name.upper()] for name in names}
    if options["precision"] == AUTO and cfg.SOLVER.AMP.ENABLED:
        options["precision"] = ""
    return options


def noise_image(channels: int, side: int) -> Tensor:
    """Return (channels, side, side) uint8, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (channels, side, side), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def _fast_precision(device: torch.device, look: Callable[[], Any] | None) -> str:
    """
    What "auto" stands for. By what the device has and by a fixed image, not by a clock or a batch:
    a resumed run and all ranks, on machines of one kind, choose the same.
    """
    if look is None or not computes_bfloat16(device):
        return ""
    wanted = _tensors(look())
    with torch.autocast(device.type, torch.bfloat16):
        found = _tensors(look())
    pairs = [(x.float(), y.float()) for x, y in zip(wanted, found) if x.is_floating_point()]
    errors = [float((x - y).square().mean().sqrt() / x.std()) for x, y in pairs]
    # A comparison with NaN is False: features that do not vary stay in float32.
    fits = bool(errors) and all(error <= MOST_DIFFERENCE for error in errors)
    logger.info(
        "MOKD.TEACHER.PRECISION auto: %s (features in bfloat16 differ by %.1f %% of their standard "
        "deviation)",
        "bfloat16" if fits else "float32",
        100 * max(errors, default=float("nan")),
    )
    return "bfloat16" if fits else ""


def _changed(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """``value`` with ``function`` applied to every tensor inside."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _changed(v, function) for key, v in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_changed(v, function) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        values = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **_changed(values, function))
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _changed(value, found.append)
    return found
