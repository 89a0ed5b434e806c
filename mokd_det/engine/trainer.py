# Copyright (c) The mokd_det authors.
"""The balanced training step, and Detectron2's default trainer around it."""

import logging
import os
import time
import weakref

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer, SimpleTrainer, create_ddp_model
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import setup_logger

from .. import modeling  # noqa: F401  (registers the distillation model and the backbones)
from ..balancing import cosine, dominance
from ..data import (
    build_resumable_train_loader,
    build_train_mapper,
    check_datasets,
    register_datasets,
)
from ..evaluation import build_evaluator
from .writers import BalanceWriter

__all__ = ["BalancedTrainer", "DistillationTrainer", "Trainer", "build_trainer"]

logger = logging.getLogger(__name__)


class BalancedTrainer(SimpleTrainer):
    """
    Detectron2's training step for a model that returns its objectives apart and has a
    ``boundary``, at which their gradients are weighed. Otherwise as :class:`SimpleTrainer`.

    The random state of a step is a function of seed, rank and iteration. So neither evaluation
    nor a stop between two steps changes what follows: a resumed run is the uninterrupted one.
    """

    def __init__(self, model, data_loader, optimizer, seed):
        """
        Args:
            model (nn.Module): a :class:`DistillationModel`, maybe in DistributedDataParallel.
            data_loader (ResumableLoader): gets this trainer's seed.
            optimizer (Optimizer): of the model's parameters.
            seed (int): equal on all ranks.
        """
        super().__init__(model, data_loader, optimizer)
        self.boundary = getattr(model, "module", model).boundary
        self.seed = seed
        self.fallbacks = 0

    def run_step(self):
        assert self.model.training, "[BalancedTrainer] model was changed to eval mode!"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        torch.manual_seed(hash((self.seed, comm.get_rank(), self.iter)) % 2**63)
        objectives = self.model(data)
        losses = [sum(parts.values()) for parts in objectives.values()]
        self.optimizer.zero_grad()
        balance = self.boundary.backward(losses)

        # Raises if the plain sum of the losses is not finite, before anything is updated.
        self._write_metrics(
            {name: loss for parts in objectives.values() for name, loss in parts.items()},
            data_time,
        )
        self._write_balance(list(objectives), balance)
        self.optimizer.step()

    def _write_balance(self, names, balance):
        """Diagnostics go to the event storage: Detectron2 adds up all that is in the losses."""
        self.fallbacks += bool(balance.fallback)
        if not comm.is_main_process():
            return
        prefix = f"balance/{self.boundary.place}"
        scalars = {f"{prefix}/fallbacks": self.fallbacks}
        for i, name in enumerate(names):
            scalars[f"{prefix}/weight_{name}"] = float(balance.weights[i])
            if i > 0:
                scalars[f"{prefix}/cosine_{name}"] = cosine(balance.gram, i, 0)
                scalars[f"{prefix}/dominance_{name}"] = dominance(balance.gram, i, 0)
        get_event_storage().put_scalars(**scalars)

    def state_dict(self):
        return {**super().state_dict(), "seed": self.seed, "fallbacks": self.fallbacks}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.seed = self.data_loader.seed = state["seed"]
        self.fallbacks = state["fallbacks"]


class Trainer(DefaultTrainer):
    """
    Detectron2's default trainer with the evaluators of its ``tools/train_net.py`` and data sets
    from the config. Training itself is Detectron2's own, bit for bit.
    """

    def __init__(self, cfg):
        prepare_datasets(cfg)
        super().__init__(cfg)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=build_train_mapper(cfg))

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return build_evaluator(cfg, dataset_name)

    # Detectron2 0.6 forgets its inner trainer here, and with it the optimizer's momentum.
    def state_dict(self):
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if "load_state_dict" not in vars(DefaultTrainer) and "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])


class DistillationTrainer(Trainer):
    """
    The default trainer for ``cfg.MOKD.ENABLED``: hooks, schedule, evaluation and logs are
    Detectron2's, the model, the loader and the step are ours.

    The checkpoint's ``model`` is the plain student under stock keys; projectors have an entry of
    their own, the teacher has none.
    """

    def __init__(self, cfg):
        # As DefaultTrainer.__init__, which leaves no other way to exchange its parts.
        super(DefaultTrainer, self).__init__()
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        check_supported(cfg)
        prepare_datasets(cfg)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        ddp_model = create_ddp_model(
            model,
            broadcast_buffers=False,
            device_ids=None if model.device.type == "cpu" else [comm.get_local_rank()],
        )
        self._trainer = BalancedTrainer(ddp_model, data_loader, optimizer, data_loader.seed)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(
            model.student,
            cfg.OUTPUT_DIR,
            trainer=weakref.proxy(self),
            projectors=model.projectors,
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg):
        name = cfg.MOKD.META_ARCHITECTURE
        if name not in META_ARCH_REGISTRY:
            raise ValueError(f"MOKD.META_ARCHITECTURE '{name}' is not in META_ARCH_REGISTRY.")
        model = META_ARCH_REGISTRY.get(name)(cfg)
        model.to(torch.device(cfg.MODEL.DEVICE))
        logger.info(f"Student:\n{model.student}")
        logger.info(f"Level map (student -> teacher): {model.level_map}")
        return model

    @classmethod
    def build_train_loader(cls, cfg):
        return build_resumable_train_loader(cfg, mapper=build_train_mapper(cfg))

    def build_writers(self):
        path = os.path.join(self.cfg.OUTPUT_DIR, "balance.json")
        return [*super().build_writers(), BalanceWriter(path)]

    def resume_or_load(self, resume=True):
        super().resume_or_load(resume)
        self._trainer.data_loader.start = self.start_iter


def build_trainer(cfg):
    """
    Args:
        cfg (CfgNode): of :func:`mokd_det.config.load_config`.

    Returns:
        Trainer: a :class:`DistillationTrainer` if ``cfg.MOKD.ENABLED``, else Detectron2's own.
    """
    return (DistillationTrainer if cfg.MOKD.ENABLED else Trainer)(cfg)


def prepare_datasets(cfg):
    """Register the data sets of the config and check those of training and evaluation."""
    register_datasets(cfg)
    check_datasets(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    if cfg.DATASETS.TEST:
        check_datasets(cfg.DATASETS.TEST, "DATASETS.TEST")


def check_supported(cfg):
    """Raise ValueError for options that distillation does not work with (yet)."""
    if cfg.SOLVER.AMP.ENABLED:
        raise ValueError(
            "SOLVER.AMP.ENABLED True is not supported with MOKD.ENABLED True yet: set it to False."
        )
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise ValueError(
            "TEST.PRECISE_BN.ENABLED True is not supported with MOKD.ENABLED True: it would run "
            "the teacher as well. Set it to False, or compute the statistics of the finished "
            "student (its checkpoint is stock)."
        )
