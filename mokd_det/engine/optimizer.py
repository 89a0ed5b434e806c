# Copyright (c) The mokd_det authors.
"""Optimizers of the config."""

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

OPTIMIZERS = ("SGD", "AdamW")
# Of torchvision's and timm's transformers.
EMBEDDINGS = (
    "class_token pos_embedding cls_token pos_embed dist_token relative_position_bias_table".split()
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """
    Return the optimizer of ``cfg.SOLVER``; "SGD" is Detectron2's own. Weight decay of norms and
    biases can be their own (``WEIGHT_DECAY_NORM``, ``WEIGHT_DECAY_BIAS``), as Detectron2 has it;
    AdamW takes that of biases for transformers' tokens and positions as well.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "SGD":
        return build_detectron2_optimizer(cfg, model)
    # As biases: they are added to activations, too.
    embeddings = {}
    if solver.WEIGHT_DECAY_BIAS is not None:
        embeddings = {name: {"weight_decay": solver.WEIGHT_DECAY_BIAS} for name in EMBEDDINGS}
    parameters = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        overrides=embeddings,
    )
    return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(
        parameters, solver.BASE_LR, tuple(solver.BETAS), weight_decay=solver.WEIGHT_DECAY
    )
