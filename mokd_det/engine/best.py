# Copyright (c) The mokd_det authors.
"""The checkpoint of the best evaluation, and an end of training when none is better."""

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.engine import hooks

from ..data.classification.sources import class_names
from ..evaluation.results import CLASSIFICATION_METRICS, METRICS
from .checkpoints import FINAL, RunCheckpointer
from .launch import on_main_process

logger = logging.getLogger(__name__)

BEST = "model_best"
SHOWN = 7  # metrics in a message; those of single classes come last
# By evaluator_type: what is evaluated, and the metrics of each. Those of other types are not known
# before the first evaluation.
KNOWN: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "classification": (("classification",), CLASSIFICATION_METRICS),
    "coco": (("bbox", "segm", "keypoints"), METRICS),
}


class EnoughTrained(BaseException):
    """Ends training early; no error, so none that Detectron2's trainer logs."""


class BestCheckpointer(hooks.BestCheckpointer):
    """
    Detectron2's hook, also for the evaluation after the last step, and with its state in the
    checkpoints. With ``patience``, it ends training after as many evaluations in a row that are not
    better than the best; all processes stop after the same step.

    A checkpoint is saved before its step's evaluation. So a run that goes on from it evaluates
    first, and is the uninterrupted one. The hook belongs behind the one that evaluates.
    """

    def __init__(self, period: int, checkpointer: RunCheckpointer, metric: str, patience: int = 0):
        """
        Args:
            period: of the evaluations, in steps.
            metric: such as "bbox/AP", the larger the better.
            patience: 0 trains to the end.
        """
        super().__init__(period, checkpointer, metric)
        self.patience = patience
        self.seen = -1  # the step of the last evaluation

    def before_train(self) -> None:
        start, end = self.trainer.start_iter, self.trainer.max_iter
        if not 0 < start < end or start % self._period:
            return
        # At the end of that step, as without a stop.
        self.trainer.iter = self.trainer.storage.iter = start - 1
        missed = self.seen != start - 1
        if missed or self._is_over(start - 1):
            evaluates = (h for h in self.trainer._hooks if isinstance(h, hooks.EvalHook))
            next(evaluates)._do_eval()
        if missed:
            self._best_checking()
        if self._is_over(start - 1):
            self._end(start - 1)
        self.trainer.iter = self.trainer.storage.iter = start

    def after_step(self) -> None:
        super().after_step()
        if self.seen == self.trainer.iter and self._is_over(self.seen):
            self._end(self.seen)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # it was evaluated behind the last step
            self._best_checking()

    def _best_checking(self) -> None:
        value, self.seen = on_main_process(self._latest)
        if self.best_metric is not None and value <= self.best_metric:
            return
        if self._update_best(value, self.seen):
            logger.info(f"The best so far: {self._val_metric} {value:.4g}, kept as {BEST}.pth")
            if self.seen >= self.trainer.max_iter:
                self._checkpointer.copy(FINAL, BEST)
            else:
                self._checkpointer.keep(BEST, iteration=self.seen)

    def _latest(self) -> tuple[float, int]:
        latest = self.trainer.storage.latest()
        if self._val_metric not in latest:
            known = ", ".join(name for name in latest if name.count("/") and name[:8] != "balance/")
            raise ValueError(
                f"TEST.BEST_METRIC is '{self._val_metric}', which the evaluation does not give; it "
                f"gives {known}."
            )
        return latest[self._val_metric]

    def _is_over(self, step: int) -> bool:
        best = self.best_iter
        return (
            bool(self.patience)
            and best is not None
            and (step - best >= self.patience * self._period)
        )

    def _end(self, step: int) -> None:
        logger.info(
            f"{self._val_metric} has not risen in {self.patience} evaluations (TEST.PATIENCE): the "
            f"run ends after iteration {step}. The best, {self.best_metric:.4g}, was after "
            f"iteration {self.best_iter}: {BEST}.pth"
        )
        self._checkpointer.save(FINAL, iteration=step)
        raise EnoughTrained

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self._val_metric,
            "best": self.best_metric,
            "best_iteration": self.best_iter,
            "seen": self.seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["metric"] != self._val_metric:
            logger.warning(
                f"TEST.BEST_METRIC was '{state['metric']}' and is '{self._val_metric}' now: the "
                "best is looked for from here on."
            )
            return
        self.best_metric, self.best_iter = state["best"], state["best_iteration"]
        self.seen = state["seen"]


def check_best_metric(cfg: CfgNode, evaluated: list[str] | None = None) -> None:
    """
    Raise ValueError for a ``TEST.BEST_METRIC`` that evaluation on ``DATASETS.TEST``, whose sets are
    registered, cannot give.

    Args:
        evaluated: the tasks, if a Python config has a model and an evaluator; none of them: only
            the first evaluation says which.
    """
    metric, names = cfg.TEST.BEST_METRIC, list(cfg.DATASETS.TEST)
    if not metric or evaluated == []:
        return
    if not names:
        raise ValueError(f"TEST.BEST_METRIC is '{metric}', but DATASETS.TEST is (): name a set.")
    several = len(names) > 1
    name = next((n for n in names if metric.startswith(f"{n}/")), None) if several else names[0]
    rest = metric[len(name) + 1 :] if several and name else metric
    metadata = MetadataCatalog.get(name or names[0])
    kind = KNOWN.get(metadata.get("evaluator_type", ""))
    tasks, metrics = kind or ((), ())
    tasks = [t for t in tasks if (_is_said(cfg, t) if evaluated is None else t in evaluated)]
    task, _, last = rest.partition("/")
    measured = _measured(cfg, metrics, metadata) if kind else []
    if name is None or not last or (kind and not (task in tasks and last in measured)):
        more = ["..."] * (len(measured) > SHOWN)
        known = ", ".join(f"{t}/{m}" for t in tasks for m in [*measured[:SHOWN], *more])
        example = f"{tasks[0]}/{measured[0]}" if kind else "bbox/AP"
        raise ValueError(
            f"TEST.BEST_METRIC is '{metric}': expected {'data set/' * several}task/metric "
            f"of DATASETS.TEST {names}, such as '{f'{names[0]}/' * several}{example}'."
            + f" There are {known}."
            * bool(known)
        )


def _is_said(cfg: CfgNode, task: str) -> bool:
    """Whether the model says what is evaluated, as far as its options tell."""
    if cfg.MODEL.META_ARCHITECTURE not in ("GeneralizedRCNN", "RetinaNet", "TorchvisionDetector"):
        return True
    is_on = {"segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return is_on.get(task, True)


def _measured(cfg: CfgNode, metrics: Sequence[str], metadata: Metadata) -> list[str]:
    """Return the metrics of a set, the first also of each class."""
    if metrics == CLASSIFICATION_METRICS:
        classes = class_names(metadata.image_path)
        has_each, metrics = cfg.TEST.PER_CLASS, metrics if len(classes) > 5 else metrics[:1]
    else:
        if "thing_classes" not in metadata.as_dict():
            DatasetCatalog.get(metadata.name)  # its annotations name them
        classes = metadata.get("thing_classes") or []
        has_each = len(classes) > 1
    return [*metrics, *(f"{metrics[0]}-{name}" for name in classes if has_each)]
