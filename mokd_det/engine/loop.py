# Copyright (c) The mokd_det authors.
"""What a run does around its steps, whether a YAML or a Python config describes it."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import TrainerBase
from detectron2.utils.events import EventWriter

from .around_step import check_trained
from .best import EnoughTrained
from .folder import claim_folder, output_errors, release_folder
from .stopping import StopOnSignal
from .tracking import start_writers
from .writers import bound_history


class RunLoop(TrainerBase):
    """
    A loop with bounded logs, that stops on signals, has its folder for itself, and says in one
    sentence if that cannot be written. The class that has the step comes behind it.
    """

    cfg: CfgNode
    checkpointer: Any
    _stop: StopOnSignal
    _writers: Sequence[EventWriter] = ()  # of the main process

    @contextlib.contextmanager
    def _in_folder(self) -> Iterator[None]:
        """Within it the run trains. ValueError: see :func:`claim_folder`."""
        claim_folder(self.cfg, resume=self.start_iter > 0)
        try:
            with self._stop.listening():
                yield
        except EnoughTrained:
            pass
        finally:
            release_folder(self.cfg.OUTPUT_DIR)

    # TrainerBase prints the traceback of every other error, also of a disk that is full.
    def before_train(self) -> None:
        with output_errors(self.cfg.OUTPUT_DIR):
            bound_history(self.storage)
            start_writers(self._writers, self.start_iter)
            super().before_train()

    def after_step(self) -> None:
        with output_errors(self.cfg.OUTPUT_DIR):
            super().after_step()

    def after_train(self) -> None:
        with output_errors(self.cfg.OUTPUT_DIR):
            super().after_train()

    def state_dict(self) -> dict[str, Any]:
        """Return this part of a checkpoint; FloatingPointError if its weights are not finite."""
        check_trained(self.checkpointer)
        return super().state_dict()
