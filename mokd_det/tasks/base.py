# Copyright (c) The mokd_det authors.
"""What a task is: all that differs between kinds of models."""

import abc
import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..config import stock_config
from ..data import ResumableLoader
from ..export import Exporter
from ..objectives import HeadReader, Level, Objective
from ..registry import Registry
from ..teachers import Teacher


class _TaskRegistry(Registry):
    def register(self, name: str) -> Callable:
        """Also KeyError for a meta-architecture that another task serves."""
        add = super().register(name)

        def decorator(cls: Any) -> Any:
            claimed = cls.meta_architectures
            if isinstance(claimed, str):
                raise TypeError(
                    f"The task '{name}' has meta_architectures '{claimed}': expected a tuple, "
                    f"('{claimed}',)."
                )
            for other in self:
                if both := sorted(set(claimed) & set(self.get(other).meta_architectures)):
                    raise KeyError(
                        f"The task '{name}' has meta_architectures {claimed}, but '{both[0]}' is "
                        f"served by the task '{other}' already: name others, or remove that one "
                        f"by TASKS.remove('{other}')."
                    )
            return add(cls)

        return decorator


TASKS = _TaskRegistry("TASKS", "MODEL.META_ARCHITECTURE")
"""Subclasses of :class:`Task`. "detection" serves every meta-architecture that no other names."""

Features = dict[str, Tensor]
Names = Sequence[str]


class Task(abc.ABC):
    """
    How models of one kind are built, tapped, fed, checked and exported. It has no state: the config
    has it all.
    """

    name: str = ""
    # The MODEL.META_ARCHITECTURE of its students.
    meta_architectures: ClassVar[tuple[str, ...]] = ()
    # Options that only models of this kind read, with all below them, besides those of its bases.
    options: ClassVar[tuple[str, ...]] = ()
    # Of mokd_det's own options those that a student's stock config needs.
    stock_options: ClassVar[tuple[str, ...]] = ()
    # Whether a student without a teacher may have Detectron2's own loader and step.
    has_stock_step: ClassVar[bool] = True

    @classmethod
    def is_one_of(cls, names: Sequence[str]) -> bool:
        """Whether it is, or derives from, a task of these names; empty: any."""
        own = {base.name for base in cls.__mro__ if issubclass(base, Task)}
        return not names or bool(own & set(names))

    @classmethod
    def all_options(cls) -> set[str]:
        """Return ``options``, also of the tasks that it derives from."""
        return {option for base in cls.__mro__ for option in vars(base).get("options", ())}

    def objectives(self, cfg: CfgNode) -> list[str]:
        """Return the names in ``MOKD.OBJECTIVES``, or for None those that its models gain from."""
        return self.usual_objectives(cfg) if cfg.MOKD.OBJECTIVES is None else cfg.MOKD.OBJECTIVES

    def usual_objectives(self, cfg: CfgNode) -> list[str]:
        """Return what ``MOKD.OBJECTIVES`` None means."""
        return ["features"]

    def rule_options(self, rule: str, objectives: Names) -> dict[str, Any]:
        """Return the arguments of a rule for options that are None, where they are not its own."""
        return {}

    # ---- models --------------------------------------------------------------------------------

    def build_student(self, cfg: CfgNode) -> nn.Module:
        """Return the stock model of a config with its initial weights, on its device."""
        return build_model(cfg)

    @abc.abstractmethod
    def load_trained(self, cfg: CfgNode, option: str = "MODEL.WEIGHTS") -> nn.Module:
        """
        Return the plain model of a config (the student, if it distils) with its trained weights, in
        eval mode.

        Args:
            option: the config key that names the weights, for messages.

        ValueError: no weights given, or they do not fit.
        """

    def stock_module(self, model: nn.Module) -> nn.Module:
        """Return the module whose state a checkpoint of a student holds under stock keys."""
        return model

    def untrained_config(self, cfg: CfgNode) -> CfgNode:
        """Return a copy of a config that builds the same model with random weights."""
        cfg = cfg.clone()
        cfg.defrost()
        if "TORCHVISION" in cfg.MODEL:
            cfg.MODEL.TORCHVISION.WEIGHTS = ""
        return cfg

    def stock_config(self, cfg: CfgNode) -> CfgNode:
        """Return a student's config as :func:`mokd_det.config.stock_config` does."""
        return stock_config(cfg, self.stock_options)

    @abc.abstractmethod
    def teacher_config(self, cfg: CfgNode) -> CfgNode:
        """
        Return the teacher's own config from a student's, on the same device. ValueError,
        FileNotFoundError: config or weights are not given, missing, or of another kind of model.
        """

    def teacher_weights_option(self, cfg: CfgNode) -> str:
        """Return what names the weights of the teacher, for messages."""
        return "MOKD.TEACHER.WEIGHTS"

    def teacher_config_at_students_size(self, cfg: CfgNode) -> CfgNode:
        """Return the teacher's config with the student's data and test images: the same work."""
        teacher_cfg = self.teacher_config(cfg)
        teacher_cfg.DATASETS = cfg.DATASETS
        for key in ("MIN_SIZE_TEST", "MAX_SIZE_TEST"):
            teacher_cfg.INPUT[key] = cfg.INPUT[key]
        return teacher_cfg

    def of_teacher(self, teacher_cfg: CfgNode) -> "Task":
        """Return the task of a teacher's own config."""
        return task_of(teacher_cfg)

    def with_teacher_weights(self, teacher_cfg: CfgNode, options: CfgNode) -> CfgNode:
        """
        Return the config of a teacher of this kind, with the weights that ``options``
        (``MOKD.TEACHER``) name. ValueError, FileNotFoundError: there are none.
        """
        raise ValueError(
            f"MOKD.TEACHER.CONFIG_FILE '{options.CONFIG_FILE}' is of a model for {self.name}, "
            "which cannot teach this student: name the config of a detector."
        )

    @abc.abstractmethod
    def build_teacher(self, cfg: CfgNode) -> Teacher:
        """
        Build the teacher of ``cfg.MOKD.TEACHER`` and load its weights strictly. ValueError,
        FileNotFoundError: see :meth:`teacher_config`; or a teacher that the student's images or
        options do not suit.
        """

    # ---- features ------------------------------------------------------------------------------

    @abc.abstractmethod
    def shared_part(self, student: nn.Module) -> nn.Module:
        """Return the module whose parameters task and distillation share: it makes the features."""

    @abc.abstractmethod
    def match_features(
        self, cfg: CfgNode, student: Any, teacher: Any, names: Names = (), teacher_names: Names = ()
    ) -> list[Level]:
        """
        Return which features of both sides are matched, and tell the teacher to give them.

        Args:
            names, teacher_names: of the features, see ``MOKD.FEATURES.STUDENT`` and ``TEACHER``.

        ValueError: a feature that a side does not have, or nothing in common.
        """

    def match_heads(
        self, cfg: CfgNode, student: Any, teacher: Any, names: Names = (), teacher_names: Names = ()
    ) -> tuple[list[Level], HeadReader]:
        """
        Return the student's features for those that the teacher's heads read, each with an
        ``align`` that brings it onto the teacher's grid; and what reads them. Tell the teacher to
        give what is needed.

        Args:
            names, teacher_names: see ``MOKD.TEACHER_HEAD.STUDENT`` and ``TEACHER``.

        ValueError: heads that cannot be read, or a feature that a side does not have.
        """
        raise ValueError(
            "MOKD.OBJECTIVES has 'teacher_head', but nothing reads the heads of models for "
            f"{self.name}: take it out."
        )

    @abc.abstractmethod
    def replace_features(
        self, student: nn.Module, names: Sequence[str], function: Callable[[Features], Features]
    ) -> contextlib.AbstractContextManager:
        """
        Return a context in which the student's shared features go through ``function`` on their
        way to the heads.

        Args:
            names: the features that objectives read, where the student has to be told.
        """

    def prepare_batch(self, student: Any, batch: Any) -> Any:
        """Return a batch as teacher and student are to see it, in the size that both run at."""
        return batch

    def check_student(self, cfg: CfgNode, student: nn.Module) -> None:
        """Raise ValueError if a student cannot be distilled."""

    def check_batch(self, cfg: CfgNode, student: nn.Module, count: int) -> None:
        """Raise ValueError if a process cannot train a student on ``count`` images at once."""

    def check_pair(
        self, cfg: CfgNode, student: nn.Module, teacher: Teacher, objectives: Sequence[Objective]
    ) -> None:
        """Raise ValueError if student, teacher and objectives do not suit each other."""

    # ---- data ----------------------------------------------------------------------------------

    @abc.abstractmethod
    def build_train_loader(self, cfg: CfgNode) -> ResumableLoader:
        """Return the loader of a config's training sets."""

    @abc.abstractmethod
    def build_test_loader(self, cfg: CfgNode, name: str) -> Iterable[Any]:
        """Return the loader of a registered data set, for evaluation; it has a length."""

    # ---- checks --------------------------------------------------------------------------------

    def check_config(self, cfg: CfgNode) -> None:
        """Raise ValueError for options out of their range. No data or weights are read for it."""

    def check_data(self, cfg: CfgNode, options: Sequence[str] = ("TRAIN", "TEST")) -> None:
        """Raise ValueError if data sets, which exist, do not suit the model."""

    def check_model(
        self, cfg: CfgNode, model: nn.Module, options: Sequence[str] = ("TRAIN", "TEST")
    ) -> None:
        """As :meth:`check_data`, for what only the model (the student) itself says."""

    # ---- export --------------------------------------------------------------------------------

    @abc.abstractmethod
    def exporter(self, cfg: CfgNode) -> Exporter:
        """Return what writes trained models of this kind for deployment."""


def task_of(cfg: CfgNode) -> Task:
    """Return the task of a config's student, by ``MODEL.META_ARCHITECTURE``."""
    for name in TASKS:
        if cfg.MODEL.META_ARCHITECTURE in TASKS.get(name).meta_architectures:
            return TASKS.get(name)()
    return TASKS.get("detection")()
