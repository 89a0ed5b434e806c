# Copyright (c) The mokd_det authors.
"""What a run is, kept in its checkpoints: only that run can be resumed from them."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..data import known_class_names
from ..data.paths import sha256_of
from ..tasks import task_of

logger = logging.getLogger(__name__)

NEW_RUN = "Start a new run (another OUTPUT_DIR) with the checkpoint as MODEL.WEIGHTS."

# A run cannot go on with another value of these. Other architectures have other weights, which are
# compared; these may have the same.
FIXED = (
    "MODEL.META_ARCHITECTURE",
    "MODEL.BACKBONE.NAME",
    "MODEL.TORCHVISION.NAME",
    "MODEL.TORCHVISION_DETECTOR.NAME",
    "MODEL.CLASSIFIER.NAME",
    "SOLVER.OPTIMIZER",
    "SOLVER.IMS_PER_BATCH",
)
# What may change without a word. The teacher's weights are compared by their content, and of seeds
# the checkpoint's counts.
FREE = (
    *("OUTPUT_DIR", "SEED", "VERSION", "VIS_PERIOD", "TEST", "DATASETS.TEST", "LOGGING"),
    *("DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.KEEP_CHECKPOINTS"),
    *("MODEL.WEIGHTS", "MOKD.TEACHER.WEIGHTS", "MOKD.TEACHER.TORCHSCRIPT.FILE"),
)


class RunIdentity:
    """
    The config of a run, the content of its teacher's file, its classes in the order of their
    numbers, and the number of processes.
    """

    def __init__(self, cfg: CfgNode):
        self.config = cfg.dump()
        self.teacher = _teacher_of(cfg)
        self.class_names = known_class_names(cfg)
        self.world_size = comm.get_world_size()

    def state_dict(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "teacher": self.teacher,
            "class_names": self.class_names,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Compare with the run of a checkpoint, which is to be resumed; say what has changed.
        ValueError: it cannot go on, since architecture, optimizer, batch or teacher are others.
        """
        if not state:
            logger.warning(
                "The checkpoint does not say what its run was (an earlier version wrote it): that "
                "optimizer, batch size, teacher and options are the same is not checked."
            )
            return
        before, now = (dict(_options(yaml.safe_load(c))) for c in (state["config"], self.config))
        changed = {
            key: f"{key} was {before.get(key)!r} and is {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        }
        fixed = [text for key, text in changed.items() if key in FIXED]
        if state["teacher"] != self.teacher and state["teacher"] and self.teacher:
            fixed.append(
                f"the teacher's weights are others ({_shown(state['teacher'])} before, "
                f"{_shown(self.teacher)} now)"
            )
        names = state.get("class_names")
        if names and self.class_names and names != self.class_names:
            fixed.append(f"its classes were {names} and are {self.class_names} now")
        free = tuple(f"{key}." for key in FREE)
        told = [
            text
            for key, text in changed.items()
            if key not in (*FIXED, *FREE) and not key.startswith(free)
        ]
        if fixed:
            # Also what would only be warned of: config.yaml may have been written anew already.
            others = f" Other options that differ: {'; '.join(told)}." if told else ""
            raise ValueError(
                f"The run in OUTPUT_DIR cannot go on: {'; '.join(fixed)}. Set it as it was. Or: "
                f"{NEW_RUN}{others}"
            )
        if state["world_size"] != self.world_size:
            logger.warning(
                f"The run had {state['world_size']} processes and goes on with {self.world_size}: "
                "the batches stay the same, the random numbers do not, so it is not the "
                "uninterrupted run."
            )
        if told:
            logger.warning(
                f"Options differ from those of the run that is resumed: {'; '.join(told)}. From "
                "here on it is not the uninterrupted run."
            )


def _teacher_of(cfg: CfgNode) -> str:
    """
    Return the SHA-256 of the file, whatever names it, or the names of a network and its weights
    that a library downloads.
    """
    if not cfg.MOKD.ENABLED:
        return ""
    script = cfg.MOKD.TEACHER.TORCHSCRIPT.FILE
    model = cfg.MODEL if script else task_of(cfg).teacher_config(cfg).MODEL
    weights = script or model.WEIGHTS or model.CLASSIFIER.WEIGHTS
    local = PathManager.get_local_path(os.path.expanduser(weights))
    return sha256_of(local) if os.path.isfile(local) else f"{model.CLASSIFIER.NAME} {weights}"


def _shown(teacher: str) -> str:
    return teacher if " " in teacher else f"SHA-256 {teacher[:12]}..."


def _options(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (full key, value) of a nested dict."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _options(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
