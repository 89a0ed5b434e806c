# Copyright (c) The mokd_det authors.
"""Detectron2's default trainer around the balanced step."""

import logging
import os
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.utils.data import DataLoader

from ..data import ResumableLoader, build_train_mapper, check_datasets, check_proposals
from ..data import register_datasets, schedule_in_iterations
from ..data import workers_that_outlive_signals
from ..evaluation import build_evaluator, check_evaluators
from ..modeling import DistillationModel, SupervisedModel
from ..tasks import Task, task_of
from .around_step import check_classes_of_teacher, check_loader, inherit
from .around_step import inherited_names, step_options, wrap_distributed
from .average import AverageCheckpointer
from .best import BestCheckpointer, check_best_metric
from .checkpoints import PeriodicCheckpointer, RunCheckpointer
from .combinations import images_at_once
from .finite import describe, raise_before_steps
from .identity import NEW_RUN, RunIdentity
from .loop import RunLoop
from .optimizer import build_optimizer
from .step import BalancedTrainer
from .stopping import StopOnSignal
from .statistics import StudentStatistics
from .summary import ExpectedTime
from .tracking import build_writers
from .validate import needs_own_step, validate
from .writers import BalanceWriter, ProgressPrinter

logger = logging.getLogger(__name__)


class Trainer(RunLoop, DefaultTrainer):
    """
    Detectron2's default trainer with the evaluators of its ``tools/train_net.py``, and data sets,
    optimizer and schedules in epochs from the config, and runs that survive: checkpoints that are
    whole, a stop on signals, one run at a time in a folder. Training itself is Detectron2's own,
    bit for bit.
    """

    def __init__(self, cfg: CfgNode):
        task = validate(cfg)
        prepare_datasets(cfg, task)
        self.check_evaluators(cfg)
        super().__init__(schedule_in_iterations(cfg))
        task.check_model(cfg, self.checkpointer.model)
        raise_before_steps(self._trainer.optimizer, self._trainer.model, self._describe)

    def _describe(self, names: list[str]) -> str:
        """Return sentences on a step of Detectron2's with parameters of such gradients."""
        latest = get_event_storage().latest().items()
        losses = {n: x for n, (x, step) in latest if "loss" in n and step == self.iter}
        return describe(names, losses, self.iter)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        loader = build_detection_train_loader(cfg, mapper=build_train_mapper(cfg))
        inner = loader if isinstance(loader, DataLoader) else getattr(loader, "dataset", None)
        if isinstance(inner, DataLoader):
            inner.worker_init_fn = workers_that_outlive_signals(inner.worker_init_fn)
        return loader

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
        return task_of(cfg).build_test_loader(cfg, dataset_name)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)

    def build_writers(self) -> list[EventWriter]:
        self._writers = build_writers(self.cfg)
        return [ProgressPrinter(self.max_iter), *self._writers]

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's, with :class:`PeriodicCheckpointer` in place of its own."""
        if not isinstance(self.checkpointer, RunCheckpointer):
            # DefaultTrainer.__init__ makes it, and leaves no other way to exchange it.
            self.checkpointer = RunCheckpointer(
                self.model, self.cfg.OUTPUT_DIR, RunIdentity(self.cfg), trainer=weakref.proxy(self)
            )
        solver = self.cfg.SOLVER
        self._stop = StopOnSignal()
        own: list[HookBase] = [self._stop]
        if comm.is_main_process():
            keep = solver.KEEP_CHECKPOINTS
            own.insert(0, PeriodicCheckpointer(self.checkpointer, solver.CHECKPOINT_PERIOD, keep))
            own.append(ExpectedTime())
        found = [h for h in super().build_hooks() if not isinstance(h, hooks.PeriodicCheckpointer)]
        # Before evaluation: what was trained is kept, and a stop does not wait for it.
        first = next(i for i, h in enumerate(found) if isinstance(h, hooks.EvalHook))
        test, behind = self.cfg.TEST, []
        if test.BEST_METRIC:
            options = test.EVAL_PERIOD, self.checkpointer, test.BEST_METRIC, test.PATIENCE
            behind.append(BestCheckpointer(*options))
        return [*found[:first], *own, found[first], *behind, *found[first + 1 :]]

    def train(self) -> Any:
        """
        As Detectron2's. ValueError: another process trains in OUTPUT_DIR, or it has checkpoints of
        an earlier run and this one is new. SystemExit: it was stopped by a signal (128 + its
        number), or OUTPUT_DIR cannot be written any more (a message).
        """
        with self._in_folder():
            return super().train()

    def check_evaluators(self, cfg: CfgNode) -> None:
        """Raise ValueError for a data set without an evaluator, before training, not after it."""
        used = getattr(self.build_evaluator, "__func__", None)  # a static method of one's own: None
        if used is vars(Trainer)["build_evaluator"].__func__:
            check_evaluators(cfg.DATASETS.TEST)

    def state_dict(self) -> dict[str, Any]:
        # Detectron2 0.6 forgets its inner trainer here, and with it the optimizer's momentum.
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError for a checkpoint of another kind of step."""
        ours = isinstance(self._trainer, BalancedTrainer)
        if not ours and "seed" in state_dict.get("_trainer", {}):
            raise ValueError(
                "The checkpoint is of a run with MOKD.ENABLED True, DATALOADER.RESUMABLE, "
                "MICRO_BATCHES or EMA_DECAY, which Detectron2's own training step cannot go on "
                f"with. {NEW_RUN}"
            )
        super().load_state_dict(state_dict)
        if "load_state_dict" not in vars(DefaultTrainer) and "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])


class DistillationTrainer(Trainer):
    """
    The default trainer for ``cfg.MOKD.ENABLED``: hooks, schedule, evaluation and logs are
    Detectron2's, the model, the loader and the step are ours. Also for a student alone, if it is a
    classifier or its config asks for a step that Detectron2 does not have.

    The checkpoint's ``model`` is the plain student under stock keys, its running mean if there is
    one (the weights that training goes on with are then in ``student``); what objectives train
    besides it (projectors) has an entry of its own, the teacher has none.
    """

    def __init__(self, cfg: CfgNode):
        # As DefaultTrainer.__init__, which leaves no other way to exchange its parts.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        task = validate(cfg)
        prepare_datasets(cfg, task)
        check_classes_of_teacher(cfg, task)
        self.check_evaluators(cfg)
        cfg = schedule_in_iterations(cfg)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())

        model: Any = self.build_model(cfg)
        task.check_model(cfg, model.student)
        task.check_batch(cfg, model.student, images_at_once(cfg))
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        check_loader(data_loader, type(self).__name__)
        ddp_model = wrap_distributed(model)
        self.inherited: list[str] = []
        if cfg.MOKD.ENABLED:
            self.inherited = inherited_names(cfg, model)
        options = step_options(cfg, model)
        self.average = options["average"]
        self._trainer = BalancedTrainer(
            ddp_model, data_loader, optimizer, data_loader.seed, **options
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AverageCheckpointer(
            model.student,
            self.average,
            cfg.OUTPUT_DIR,
            RunIdentity(cfg),
            task.stock_module,
            trainer=weakref.proxy(self),
            objectives=model.objectives,
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> DistillationModel | SupervisedModel:
        task = task_of(cfg)
        if not cfg.MOKD.ENABLED:
            model = SupervisedModel(task.build_student(cfg))
            logger.debug(f"Model:\n{model.student}")
            return model
        name = cfg.MOKD.META_ARCHITECTURE
        if name not in META_ARCH_REGISTRY:
            raise ValueError(
                f"MOKD.META_ARCHITECTURE is '{name}', which is not in META_ARCH_REGISTRY: leave it "
                "out (it is 'DistillationModel' then), or import the module that registers yours."
            )
        model = META_ARCH_REGISTRY.get(name)(cfg, task=task)
        model.to(torch.device(cfg.MODEL.DEVICE))
        logger.debug(f"Student:\n{model.student}")
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableLoader:
        return task_of(cfg).build_train_loader(cfg)

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's, but the statistics of BatchNorm are the student's alone."""
        found = super().build_hooks()
        if self.cfg.TEST.PRECISE_BN.ENABLED:
            own = StudentStatistics(
                self.cfg.TEST.EVAL_PERIOD,
                self._trainer.inner.student,
                self._build_other_loader,
                self.cfg.TEST.PRECISE_BN.NUM_ITER,
            )
            found = [own if isinstance(hook, hooks.PreciseBN) else hook for hook in found]
        return found

    def _build_other_loader(self) -> ResumableLoader:
        """Return a second one, which leaves the training's as it is."""
        loader = self.build_train_loader(self.cfg)
        loader.seed = self._trainer.data_loader.seed
        return loader

    def build_writers(self) -> list[EventWriter]:
        path = os.path.join(self.cfg.OUTPUT_DIR, "balance.json")
        return [*super().build_writers(), BalanceWriter(path)]

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        self._trainer.data_loader.start = self.start_iter
        if self.inherited and not (resume and self.checkpointer.has_checkpoint()):
            inherit(self._trainer, self.inherited)


def build_trainer(cfg: CfgNode) -> Trainer:
    """Return the :class:`DistillationTrainer` if the config needs it, else Detectron2's own."""
    return (DistillationTrainer if needs_own_step(cfg) else Trainer)(cfg)


def prepare_datasets(
    cfg: CfgNode, task: Task, is_training: bool = True, evaluated: list[str] | None = None
) -> None:
    """
    Register the data sets of the config and check that those of training (unless it is for
    evaluation only) and evaluation exist and suit the task. ``evaluated``: see
    :func:`check_best_metric`.
    """
    register_datasets(cfg)
    options = [*(["TRAIN"] if is_training else []), "TEST"]
    for option in options:
        if option == "TRAIN" or not is_training or cfg.DATASETS.TEST:
            check_datasets(cfg.DATASETS[option], f"DATASETS.{option}")
            check_proposals(cfg, [option])
    task.check_data(cfg, options)
    if is_training:
        check_best_metric(cfg, evaluated)
