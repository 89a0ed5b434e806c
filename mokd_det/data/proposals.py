# Copyright (c) The mokd_det authors.
"""Precomputed proposals (MODEL.LOAD_PROPOSALS), which Detectron2 keeps in pickles."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..untrusted import read_pickle


def check_proposals(cfg: CfgNode, options: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """
    Check the proposal files of these data sets before Detectron2 reads them. ValueError,
    FileNotFoundError: a file that is missing or holds other than proposals, or one too few.
    """
    for option in options if cfg.MODEL.LOAD_PROPOSALS else ():
        key, sets = f"DATASETS.PROPOSAL_FILES_{option}", cfg.DATASETS[option]
        files = cfg.DATASETS[f"PROPOSAL_FILES_{option}"]
        if len(files) != len(sets):
            raise ValueError(
                f"{key} has {len(files)} files, but DATASETS.{option} {len(sets)} data sets, and "
                "MODEL.LOAD_PROPOSALS is True: name one for each."
            )
        for file in files:
            if "://" not in file and not PathManager.isfile(file):
                raise FileNotFoundError(f"{key} '{file}' does not exist.")
            with PathManager.open(file, "rb") as opened:
                proposals = read_pickle(opened, name=f"{key} '{file}'")
            found = set(proposals) if isinstance(proposals, dict) else set()
            if not found >= {"boxes"} or not found & {"ids", "indexes"}:
                raise ValueError(
                    f"{key} '{file}' holds no proposals: expected a pickled dict with 'ids', "
                    "'boxes' and 'objectness_logits'."
                )
