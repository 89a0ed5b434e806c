# Copyright (c) The mokd_det authors.
"""``mokd init``: what differs between kinds of models."""

import abc
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

from detectron2.config import CfgNode

from ..data import local_path
from ..data.classes import listed_names


class Model(NamedTuple):
    """A config that comes with mokd_det, and what is added to it."""

    config: str
    options: dict[str, Any] = {}


class Data(NamedTuple):
    """A data set: its classes, the number of images, and their median shorter side in pixels."""

    classes: list[str]
    images: int
    side: int = 0


class Kind(abc.ABC):
    """Detectors, or classifiers: their names, data and usual options."""

    task: ClassVar[str]
    noun: ClassVar[str]
    needs: ClassVar[str]  # of data
    least_steps: ClassVar[int]
    images: int  # a step, on each device
    has_python_configs: ClassVar[bool] = False

    @abc.abstractmethod
    def knows(self, name: str) -> bool:
        """Return whether some model of this kind is called so."""

    @abc.abstractmethod
    def student(self, name: str) -> Model:
        """Return a model; ValueError, ImportError: it is unknown, or its library is missing."""

    @abc.abstractmethod
    def teacher(self, name: str) -> Model | None:
        """Return a model; None: the name may be a file's. Errors: see :meth:`student`."""

    @abc.abstractmethod
    def teacher_names(self) -> list[str]:
        """Return names that a misspelt one may mean."""

    @abc.abstractmethod
    def ready(self, name: str, weights: str, data: Data) -> tuple[dict[str, Any], int] | None:
        """
        Return the options of MOKD.TEACHER, without that prefix, for a teacher by name that knows
        the classes of the data already, and the size of its images; ``weights``: the user's, "" for
        its own. None: it is to be trained on the data first. ValueError, FileNotFoundError: weights
        that are none for it.
        """

    def check_teacher(self, cfg: CfgNode, weights: str, data: Data) -> None:
        """Raise ValueError for a trained teacher that does not suit the data."""

    @abc.abstractmethod
    def read(self, files: Sequence[str], option: str) -> Data:
        """Check a data set and print its warnings; ValueError, FileNotFoundError: it is wrong."""

    @abc.abstractmethod
    def epochs(self, data: Data) -> int:
        """Return the usual length of a schedule."""

    @abc.abstractmethod
    def common(self, sets: dict[str, list[str]], steps: int) -> dict[str, Any]:
        """Return what all runs share; ``sets``: absolute paths, by name."""

    @abc.abstractmethod
    def options(self, model: Model, data: Data, batch: int) -> dict[str, Any]:
        """Return the options of a model without a teacher."""

    @abc.abstractmethod
    def downloads(self, files: Iterable[dict[str, Any]]) -> str:
        """Return a sentence on what these configs download, "" for nothing."""

    def baseline(self) -> dict[str, Any]:
        """Return what a student without a teacher needs to see the images of the other one."""
        return {}

    def distilled(self, size: int) -> dict[str, Any]:
        """Return options of a student whose teacher was trained on images of this size."""
        return {}


def local(path: str) -> str:
    """Return the file of "datasets://x", as the scripts of datasets/ print them, and of others."""
    return local_path(path) if path.startswith("datasets://") else path


REMEDY = "A teacher by name alone is trained on your data first."


def check_number(number: int, classes: list[str]) -> None:
    """ValueError: a trained teacher has another number of classes."""
    if number != len(classes):
        raise ValueError(
            f"--teacher knows {number} classes, but --data has {listed_names(classes)}. {REMEDY}"
        )
