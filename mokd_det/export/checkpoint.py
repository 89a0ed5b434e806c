# Copyright (c) The mokd_det authors.
"""The student as a checkpoint and a config that stock Detectron2 loads."""

import os
from typing import TYPE_CHECKING

import torch
from detectron2.config import CfgNode

if TYPE_CHECKING:
    from ..tasks import Task


def export_checkpoint(task: "Task", cfg: CfgNode, output_dir: str) -> dict[str, str]:
    """
    Write ``model.pth`` (weights only: no optimizer, no projector) and ``config.yaml`` (the keys of
    :func:`~mokd_det.config.stock_config`, ``MODEL.WEIGHTS`` pointing to the file beside it).

    Args:
        task: of the student.
        cfg: the student's config with its trained ``MODEL.WEIGHTS``.
        output_dir: folder.

    Returns:
        Paths of ``weights`` and ``config``.

    Raises:
        ValueError: the weights do not fit the config, or the folder is a run's own.
    """
    if os.path.isfile(os.path.join(output_dir, "last_checkpoint")):
        raise ValueError(
            f"--output is '{output_dir}', the OUTPUT_DIR of a run (it has a last_checkpoint), "
            "whose config.yaml would be overwritten: choose another folder."
        )
    model = task.load_trained(cfg)
    os.makedirs(output_dir, exist_ok=True)
    weights = os.path.join(output_dir, "model.pth")
    config = os.path.join(output_dir, "config.yaml")
    torch.save({"model": model.state_dict(), "__author__": "mokd_det"}, weights)
    # What training started from is not needed: there is nothing to download here.
    stock = task.stock_config(task.untrained_config(cfg))
    stock.MODEL.WEIGHTS = os.path.abspath(weights)  # so that it works from any folder
    with open(config, "w") as f:
        f.write(stock.dump())
    return {"weights": weights, "config": config}
