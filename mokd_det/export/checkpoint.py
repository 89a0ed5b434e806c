# Copyright (c) The mokd_det authors.
"""The student as a checkpoint and a config that stock Detectron2 loads."""

import os

import torch

from ..config import stock_config
from ..modeling import is_classifier, load_trained_model, without_initial_weights

__all__ = ["export_checkpoint"]


def export_checkpoint(cfg, output_dir):
    """
    Write ``model.pth`` (weights only: no optimizer, no projector) and ``config.yaml`` (the keys of
    :func:`~mokd_det.config.stock_config`, ``MODEL.WEIGHTS`` pointing to the file beside it).

    Args:
        cfg (CfgNode): the student's config with its trained ``MODEL.WEIGHTS``.
        output_dir (str): folder.

    Returns:
        dict[str, str]: paths of ``weights`` and ``config``.

    Raises:
        ValueError: the weights do not fit the config, or the folder is a run's own.
    """
    if os.path.isfile(os.path.join(output_dir, "last_checkpoint")):
        raise ValueError(
            f"--output is '{output_dir}', the OUTPUT_DIR of a run (it has a last_checkpoint), "
            "whose config.yaml would be overwritten: choose another folder."
        )
    model = load_trained_model(cfg)
    os.makedirs(output_dir, exist_ok=True)
    weights = os.path.join(output_dir, "model.pth")
    config = os.path.join(output_dir, "config.yaml")
    torch.save({"model": model.state_dict(), "__author__": "mokd_det"}, weights)
    stock = stock_config(cfg)
    # What training started from: there is nothing to download here.
    if is_classifier(stock):
        stock = without_initial_weights(stock)
    if "TORCHVISION" in stock.MODEL:
        stock.MODEL.TORCHVISION.WEIGHTS = ""
    stock.MODEL.WEIGHTS = os.path.abspath(weights)  # so that it works from any folder
    with open(config, "w") as f:
        f.write(stock.dump())
    return {"weights": weights, "config": config}
