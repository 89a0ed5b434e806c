# Copyright (c) The mokd_det authors.
"""A distillation that is described in Python, with the habits of Detectron2's LazyConfig."""

import copy
import functools
import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, instantiate
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..config import check_device, check_targets
from ..modeling import DistillationModel, StrictCheckpointer, load_lazy_config
from ..tasks import task_of
from .around_step import check_classes_of_teacher, check_loader, inherit
from .around_step import inherited_names, step_options, wrap_distributed
from .average import AverageCheckpointer
from .best import BestCheckpointer, check_best_metric
from .checkpoints import PeriodicCheckpointer
from .combinations import check_batch, images_at_once
from .identity import RunIdentity
from .lazy_options import check_keys, describe_evaluation, described, evaluated_tasks, filled
from .loop import RunLoop
from .step import BalancedTrainer
from .stopping import StopOnSignal
from .summary import ExpectedTime
from .tracking import build_writers
from .trainer import prepare_datasets
from .validate import validate
from .writers import BalanceWriter, ProgressPrinter

logger = logging.getLogger(__name__)


def distil(
    student: nn.Module, *, train: Mapping[str, Any], input_format: str = "BGR", **mokd: Any
) -> DistillationModel:
    """
    Return a student with its teacher, objectives and rule: the ``model`` of a Python config.

    Args:
        student: a detector as :class:`mokd_det.tasks.DetectionTask` takes it.
        train: the ``train`` of the same config.
        input_format: of the images that the loader gives, "RGB" or "BGR".
        mokd: the options of the block ``MOKD`` in lower case: ``teacher=dict(weights=...)``.

    ValueError, FileNotFoundError: as for a YAML config.
    """
    cfg = described(train, input_format, mokd)
    validate(cfg)
    check_device(cfg)
    model = DistillationModel(cfg, task=task_of(cfg), student=student.to(cfg.MODEL.DEVICE))
    model.cfg = cfg
    return model


def read_lazy(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """
    Return a Python config, its ``train`` completed; ``overrides`` are "train.max_iter=10" and the
    like. ValueError, FileNotFoundError: no such file, nobody trusts it, something is missing.
    """
    cfg = load_lazy_config(config_file, overrides, "--config-file")
    check_targets(cfg, f"--config-file '{config_file}'")
    try:
        if "train" in cfg:
            cfg.train = filled(cfg.train)
        check_keys(cfg, f"--config-file '{config_file}'")
    except OmegaConfBaseException as error:  # "${...}" of what is not there
        raise ValueError(f"--config-file '{config_file}' is no config: {error}") from error
    return cfg


def evaluate_lazy(cfg: DictConfig) -> Any:
    """
    Return the results of the student with the weights ``train.init_checkpoint``, without a teacher.
    ValueError: they do not fit.
    """
    weights, option = cfg.train.init_checkpoint, "train.init_checkpoint"
    if not weights or cfg.dataloader.get("evaluator") is None:
        raise ValueError(f"Evaluation needs {option} and dataloader.evaluator: one is not there.")
    check_device(CfgNode({"MODEL": {"DEVICE": cfg.train.device}}))
    student = _built(cfg, "model", "student").to(cfg.train.device)
    StrictCheckpointer(student, option=option).load(weights, checkpointables=[])
    return _evaluated(cfg, student)


def _built(cfg: DictConfig, *names: str) -> Any:
    """Build a part of a config, such as ("dataloader", "test"); ValueError: arguments that fail."""
    try:
        return instantiate(functools.reduce(getattr, names, cfg))
    except TypeError as error:
        raise ValueError(f"{'.'.join(names)} cannot be built: {error}") from error


def _evaluated(cfg: DictConfig, model: nn.Module) -> Any:
    if cfg.dataloader.get("evaluator") is None:
        return {}
    loader, evaluator = (_built(cfg, "dataloader", name) for name in ("test", "evaluator"))
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results)
    return results


class LazyTrainer(RunLoop, BalancedTrainer):
    """
    The balanced step for a Python config, with the hooks of Detectron2's own tool
    and our checkpoints: the student is plain, a resumed run the uninterrupted one.
    """

    def __init__(self, cfg: DictConfig):
        """
        Args:
            cfg: of :func:`read_lazy`. It has ``model`` (:func:`distil`), ``train``, ``optimizer``,
                ``lr_multiplier``, ``dataloader.train`` (:func:`mokd_det.data.resumable_loader`),
                and for evaluation ``dataloader.test`` and ``dataloader.evaluator``.

        ValueError, FileNotFoundError: what does not fit.
        """
        self.options = filled(cfg.train)
        if "train" in cfg.model and filled(cfg.model.train) != self.options:
            raise ValueError("model.train is not the config's train: set it to '${train}'.")
        model = _built(cfg, "model")
        if not isinstance(model, DistillationModel):
            raise ValueError(
                f"model builds a {type(model).__name__}: expected L(mokd_det.engine.distil)(...). "
                "A model without a teacher is for Detectron2's tools/lazyconfig_train_net.py."
            )
        self.cfg = self._check_data(cfg, model)
        with_model = copy.deepcopy(cfg)
        with_model.optimizer.params.model = model
        optimizer = _built(with_model, "optimizer")
        optimizer = maybe_add_gradient_clipping(self.cfg, optimizer)
        loader = _built(cfg, "dataloader", "train")
        check_loader(loader, "dataloader.train")
        self.cfg.SOLVER.IMS_PER_BATCH = loader.batch_size * comm.get_world_size()
        self.cfg.SOLVER.OPTIMIZER = type(optimizer).__name__
        check_batch(self.cfg)
        model.task.check_batch(self.cfg, model.student, images_at_once(self.cfg))
        ddp_model = wrap_distributed(model)
        self._inherited = inherited_names(self.cfg, model)
        options = step_options(self.cfg, model)
        super().__init__(ddp_model, loader, optimizer, loader.seed, **options)
        self.checkpointer = AverageCheckpointer(
            model.student,
            self.average,
            self.options["output_dir"],
            RunIdentity(self.cfg),
            trainer=weakref.proxy(self),
            objectives=model.objectives,
        )
        self.results: Any = {}
        self._stop = StopOnSignal()
        self.register_hooks(self._hooks_of(cfg))

    def _check_data(self, cfg: DictConfig, model: Any) -> CfgNode:
        """Return the run's options as those of a YAML config; ValueError: data that do not fit."""
        run = model.cfg
        describe_evaluation(run, cfg, self.options)
        validate(run)
        evaluated = evaluated_tasks(cfg, model.student)
        if run.DATASETS.TRAIN:
            prepare_datasets(run, model.task, evaluated=evaluated)
            check_classes_of_teacher(run, model.task)
            model.task.check_model(run, model.student)
        else:
            check_best_metric(run, evaluated)
        if cfg.dataloader.get("evaluator") is None:
            logger.warning("The student is not evaluated: there is no dataloader.evaluator.")
        return run

    def _hooks_of(self, cfg: DictConfig) -> list[HookBase | None]:
        options, main = self.options, comm.is_main_process()
        keep, period = options["checkpointer"], options["eval_period"]
        saving = PeriodicCheckpointer(self.checkpointer, keep["period"], keep["max_to_keep"])
        best = None
        if metric := options["best_metric"]:
            best = BestCheckpointer(period, self.checkpointer, metric, options["patience"])
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=_built(cfg, "lr_multiplier")),
            saving if main else None,
            self._stop,
            ExpectedTime() if main else None,
            hooks.EvalHook(period, lambda: self._evaluate(cfg)),
            best,
            hooks.PeriodicWriter(self._build_writers(), options["log_period"]) if main else None,
        ]

    def _build_writers(self) -> list[EventWriter]:
        self._writers = build_writers(self.cfg)
        balance = BalanceWriter(os.path.join(self.options["output_dir"], "balance.json"))
        return [ProgressPrinter(self.options["max_iter"]), *self._writers, balance]

    def _evaluate(self, cfg: DictConfig) -> Any:
        self.results = _evaluated(cfg, self.inner)
        return self.results

    def resume_or_load(self, resume: bool) -> None:
        """Load the last checkpoint of ``train.output_dir``, or ``train.init_checkpoint``."""
        self.checkpointer.resume_or_load(self.options["init_checkpoint"], resume=resume)
        goes_on = resume and self.checkpointer.has_checkpoint()
        self.start_iter = self.iter + 1 if goes_on else 0
        self.data_loader.start = self.start_iter
        if self._inherited and not goes_on:
            inherit(self, self._inherited)

    def run(self) -> Any:
        """Train; return the last results. Errors: see :meth:`Trainer.train`."""
        with self._in_folder():
            self.train(self.start_iter, self.options["max_iter"])
        return self.results
