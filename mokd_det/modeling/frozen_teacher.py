# Copyright (c) The mokd_det authors.
"""What every teacher has in common: it is only ever run, and as fast as the options say."""

import contextlib
import dataclasses
import functools
import itertools

import torch

from .acceleration import check_backend

__all__ = ["FrozenTeacher", "speed_options"]

PRECISIONS = {
    "": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class FrozenTeacher:
    """
    A model that is only ever run, in eval mode and without gradients.

    Deliberately no ``nn.Module``: whatever holds a teacher shows none of it in ``parameters()``,
    ``state_dict()``, the optimizer or DistributedDataParallel.
    """

    def __init__(
        self,
        model,
        body,
        *,
        precision="",
        channels_last=False,
        compile="",
        inference_mode=False,
        stream=False,
    ):
        """
        Args:
            model (nn.Module): the whole teacher.
            body (nn.Module): the part of it that is compiled and whose memory format changes.
            precision, channels_last, compile, inference_mode, stream: see ``MOKD.TEACHER``.

        Raises:
            ValueError: an option that this model or machine does not have.
        """
        self.model = model.eval().requires_grad_(False)
        if precision not in PRECISIONS:
            raise ValueError(
                f"MOKD.TEACHER.PRECISION is '{precision}': expected one of "
                f"{', '.join(map(repr, PRECISIONS))}."
            )
        self.precision = PRECISIONS[precision]
        # A frozen TorchScript module has neither parameters nor buffers, but its detector has.
        device = next(itertools.chain(model.parameters(), model.buffers())).device
        self._autocast = contextlib.nullcontext
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
        self._stream = None
        if stream:
            if device.type != "cuda":
                raise ValueError(
                    f"MOKD.TEACHER.STREAM True needs a GPU, but MODEL.DEVICE is '{device}': set "
                    "it to False."
                )
            self._stream = torch.cuda.Stream(device)

    def wait(self, view):
        """Make the current CUDA stream wait for what :meth:`_run_beside` returned."""
        if self._stream is not None:
            current = self._students_stream()
            current.wait_stream(self._stream)
            for tensor in _tensors(view):
                tensor.record_stream(current)

    def _students_stream(self):
        # Of the teacher's GPU, which need not be the current one.
        return torch.cuda.current_stream(self._stream.device)

    def _run_beside(self, function, *args):
        """As :meth:`_run`, on the teacher's own stream if it has one."""
        if self._stream is None:
            return self._run(function, *args)
        self._stream.wait_stream(self._students_stream())
        with torch.cuda.stream(self._stream):
            return self._run(function, *args)

    def _run(self, function, *args):
        # Again at every step: nothing that walks over modules may have left it in train mode.
        self.model.eval()
        mode = torch.inference_mode if self._inference_mode else torch.no_grad
        with mode(), self._autocast():
            result = function(*args)
        # Tensors made in inference mode can never take part in a backward pass, not even as
        # constants.
        return _changed(result, torch.clone) if self._inference_mode else result


def speed_options(cfg):
    """Return those keyword arguments of :class:`FrozenTeacher` that ``cfg.MOKD.TEACHER`` has."""
    options = cfg.MOKD.TEACHER
    return {
        "precision": options.PRECISION,
        "channels_last": options.CHANNELS_LAST,
        "compile": options.COMPILE,
        "inference_mode": options.INFERENCE_MODE,
        "stream": options.STREAM,
    }


def _changed(value, function):
    """``value`` with ``function`` applied to every tensor inside."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _changed(v, function) for key, v in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_changed(v, function) for v in value)
    if dataclasses.is_dataclass(value):
        values = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **_changed(values, function))
    return value


def _tensors(value):
    found = []
    _changed(value, found.append)
    return found
