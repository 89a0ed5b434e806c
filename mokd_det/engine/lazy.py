# Copyright (c) The mokd_det authors.
"""A distillation that is described in Python, with the habits of Detectron2's LazyConfig."""

import copy
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, instantiate
from detectron2.engine import HookBase, hooks
from detectron2.engine.defaults import default_writers
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..config import check_device, check_targets, get_cfg, merge_overrides
from ..modeling import DistillationModel, StrictCheckpointer, load_lazy_config
from ..registry import did_you_mean
from ..tasks import task_of
from .checkpoints import PeriodicCheckpointer, RunCheckpointer
from .folder import claim_folder, release_folder
from .identity import RunIdentity
from .step import BalancedTrainer
from .stopping import StopOnSignal
from .trainer import check_classes_of_teacher, check_loader, prepare_datasets, wrap_distributed
from .validate import validate
from .writers import BalanceWriter, bound_history

# Of ``train``, as in Detectron2's configs/common/train.py, and what our step has besides.
TRAIN: dict[str, Any] = {
    "output_dir": "./output",
    "init_checkpoint": "",
    "max_iter": 90000,
    "amp": {"enabled": False, "precision": "float16"},
    "checkpointer": {"period": 5000, "max_to_keep": 0},
    "eval_period": 5000,
    "log_period": 20,
    "device": "cuda",
    "seed": -1,
    "micro_batches": 1,
    "clip_gradients": {"clip_type": "", "clip_value": 1.0, "norm_type": 2.0},
}
REQUIRED = ("model", "train", "optimizer", "lr_multiplier", "dataloader")


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
    options = _filled(train)
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "LazyConfigDetector"
    cfg.MODEL.DEVICE, cfg.INPUT.FORMAT = options["device"], input_format
    cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER = options["output_dir"], options["max_iter"]
    cfg.SOLVER.STEPS, cfg.SOLVER.MICRO_BATCHES = (), options["micro_batches"]
    for key in ("enabled", "precision"):
        cfg.SOLVER.AMP[key.upper()] = options["amp"][key]
    if options["clip_gradients"]["clip_type"]:
        clip = {key.upper(): value for key, value in options["clip_gradients"].items()}
        cfg.SOLVER.CLIP_GRADIENTS.update({"ENABLED": True, **clip})
    given = _flat(_plain(mokd), "MOKD")
    merge_overrides(cfg, ["MOKD.ENABLED", True, *(x for pair in given for x in pair)], "model")
    check_device(cfg)
    validate(cfg)
    model = DistillationModel(cfg, task=task_of(cfg), student=student.to(options["device"]))
    model.cfg = cfg
    return model


def read_lazy(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """
    Return a Python config, its ``train`` completed; ``overrides`` are "train.max_iter=10" and the
    like. ValueError, FileNotFoundError: no such file, nobody trusts it, something is missing.
    """
    cfg = load_lazy_config(config_file, overrides, "--config-file")
    check_targets(cfg, f"--config-file '{config_file}'")
    if missing := [key for key in REQUIRED if key not in cfg]:
        raise ValueError(
            f"--config-file '{config_file}' has no '{missing[0]}': expected {', '.join(REQUIRED)}."
        )
    cfg.train = _filled(cfg.train)
    return cfg


def evaluate_lazy(cfg: DictConfig) -> Any:
    """
    Return the results of the student with the weights ``train.init_checkpoint``, without a teacher.
    ValueError: they do not fit.
    """
    weights, option = cfg.train.init_checkpoint, "train.init_checkpoint"
    if not weights or "evaluator" not in cfg.dataloader:
        raise ValueError(f"Evaluation needs {option} and dataloader.evaluator: one is not there.")
    student = instantiate(cfg.model.student).to(cfg.train.device)
    StrictCheckpointer(student, option=option).load(weights, checkpointables=[])
    return _evaluated(cfg, student)


def _evaluated(cfg: DictConfig, student: nn.Module) -> Any:
    if "evaluator" not in cfg.dataloader:
        return {}
    loader, evaluator = map(instantiate, (cfg.dataloader.test, cfg.dataloader.evaluator))
    results = inference_on_dataset(student, loader, evaluator)
    print_csv_format(results)
    return results


def _plain(value: Any) -> Any:
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _flat(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{prefix}.{key.upper()}"
        if isinstance(value, dict):
            yield from _flat(value, name)
        else:
            yield name, value


def _filled(train: Any) -> dict[str, Any]:
    """Return ``train`` with defaults; ValueError for what nobody reads."""

    def filled(given: Mapping[str, Any], usual: Mapping[str, Any], name: str) -> dict[str, Any]:
        for key in given:
            if key not in usual:
                raise ValueError(f"There is no option {name}.{key}. {did_you_mean(key, usual)}")
        return {
            key: filled(given.get(key, {}), value, f"{name}.{key}")
            if isinstance(value, dict)
            else given.get(key, value)
            for key, value in usual.items()
        }

    return filled(_plain(train), TRAIN, "train")


class LazyTrainer(BalancedTrainer):
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
        self.options = _filled(cfg.train)
        model = instantiate(cfg.model)
        if not isinstance(model, DistillationModel):
            raise ValueError(
                f"model builds a {type(model).__name__}: expected L(mokd_det.engine.distil)(...). "
                "A model without a teacher is for Detectron2's tools/lazyconfig_train_net.py."
            )
        self.described = self._check_data(cfg, model)
        optimizer_cfg = copy.deepcopy(cfg.optimizer)
        optimizer_cfg.params.model = model
        optimizer = maybe_add_gradient_clipping(self.described, instantiate(optimizer_cfg))
        loader = instantiate(cfg.dataloader.train)
        check_loader(loader, "dataloader.train")
        amp = self.options["amp"]
        super().__init__(
            wrap_distributed(model),
            loader,
            optimizer,
            loader.seed,
            self.options["micro_batches"],
            amp["precision"] if amp["enabled"] else None,
        )
        self.described.SOLVER.IMS_PER_BATCH = loader.batch_size * comm.get_world_size()
        self.described.SOLVER.OPTIMIZER = type(optimizer).__name__
        self.checkpointer = RunCheckpointer(
            model.student,
            self.options["output_dir"],
            RunIdentity(self.described),
            trainer=weakref.proxy(self),
            objectives=model.objectives,
        )
        self.results: Any = {}
        self._stop = StopOnSignal()
        self.register_hooks(self._hooks_of(cfg))

    def _check_data(self, cfg: DictConfig, model: Any) -> CfgNode:
        """Return the run's options as those of a YAML config; ValueError: data that do not fit."""
        described = model.cfg
        for split in ("train", "test"):
            names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names") or ()
            names = (names,) if isinstance(names, str) else tuple(names)
            described.DATASETS[split.upper()] = names
        if described.DATASETS.TRAIN:
            prepare_datasets(described, model.task)
            check_classes_of_teacher(described, model.task)
            model.task.check_model(described, model.student)
        return described

    def _hooks_of(self, cfg: DictConfig) -> list[HookBase | None]:
        options = self.options
        keep, main = options["checkpointer"], comm.is_main_process()
        saving = PeriodicCheckpointer(self.checkpointer, keep["period"], keep["max_to_keep"])
        return [
            hooks.CallbackHook(before_train=lambda trainer: bound_history(trainer.storage)),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            saving if main else None,
            self._stop,
            hooks.EvalHook(options["eval_period"], lambda: self._evaluate(cfg)),
            hooks.PeriodicWriter(self._writers(), options["log_period"]) if main else None,
        ]

    def _writers(self) -> list[Any]:
        folder, max_iter = self.options["output_dir"], self.options["max_iter"]
        os.makedirs(folder, exist_ok=True)
        balance = BalanceWriter(os.path.join(folder, "balance.json"))
        return [*default_writers(folder, max_iter), balance]

    def _evaluate(self, cfg: DictConfig) -> Any:
        self.results = _evaluated(cfg, self.inner.student)
        return self.results

    def resume_or_load(self, resume: bool) -> None:
        """Load the last checkpoint of ``train.output_dir``, or ``train.init_checkpoint``."""
        self.checkpointer.resume_or_load(self.options["init_checkpoint"], resume=resume)
        self.start_iter = self.iter + 1 if resume and self.checkpointer.has_checkpoint() else 0
        self.data_loader.start = self.start_iter

    def run(self) -> Any:
        """Train; return the last results. Errors: see :meth:`Trainer.train`."""
        claim_folder(self.described, resume=self.start_iter > 0)
        try:
            with self._stop.listening():
                self.train(self.start_iter, self.options["max_iter"])
        finally:
            release_folder(self.described.OUTPUT_DIR)
        return self.results
