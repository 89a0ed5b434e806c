# Copyright (c) The mokd_det authors.
"""Any torchvision classification model as a Detectron2 backbone, alone or with FPN."""

from collections.abc import Sequence
from typing import Dict, List, NamedTuple  # noqa: UP035  (TorchScript)

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from . import networks
from .state import eval_mode

STAGE_OF_STRIDE = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}  # as Detectron2 names them


class TorchvisionBackbone(Backbone):
    """
    A torchvision classification model without its classifier. Outputs carry Detectron2's names:
    ``res2`` to ``res5`` for strides 4 to 32. Parameters keep torchvision's names.
    """

    _channels_last: List[str]  # noqa: UP006  (TorchScript cannot infer it of an empty list)

    def __init__(
        self,
        name: str,
        *,
        weights: str = "",
        out_features: Sequence[str] = (),
        nodes: Sequence[str] = (),
        norm: str = "BN",
        freeze_at: int = 0,
    ):
        """
        Args:
            name, weights, out_features, nodes, norm: see ``MODEL.TORCHVISION``. A file of weights
                has the state dict of the whole classification model.
            freeze_at: stages up to ``res{freeze_at}`` do not train, and their BatchNorm keeps its
                statistics (1: the layers of stride 2 before the stage of stride 4; the first
                layer, if it has that stride itself). 0 trains all.

        ValueError: unknown name, weights, stage, node or norm; the message has the choices.
        """
        super().__init__()
        if norm not in ("BN", "FrozenBN"):
            raise ValueError(f"MODEL.TORCHVISION.NORM is '{norm}': expected 'BN' or 'FrozenBN'.")
        model = _build_model(name, weights)
        maps = _feature_maps(model)
        automatic = _nodes_by_stride(model, maps)
        chosen = _choose_nodes(name, maps, automatic, out_features, nodes)
        frozen = _freeze(model, maps, {**automatic, **chosen}, freeze_at, name) if freeze_at else []
        self.body = create_feature_extractor(model, {node: f for f, node in chosen.items()})
        _check_nodes_stay(self.body, chosen)
        if norm == "FrozenBN":
            # After tracing: the tracer takes torch's own normalisation only as one node.
            self.body = FrozenBatchNorm2d.convert_frozen_batchnorm(self.body)
        for path in frozen:
            _freeze_norm(self.body, path)
        outputs = {stage: maps[node] for stage, node in chosen.items()}
        self._channels_last = [stage for stage, m in outputs.items() if m.channels_last]
        self._out_features = list(outputs)
        self._out_feature_channels = {stage: m.channels for stage, m in outputs.items()}
        self._out_feature_strides = {stage: m.stride for stage, m in outputs.items()}

    def forward(self, x: Tensor) -> Dict[str, Tensor]:  # noqa: UP006  (TorchScript)
        """From normalised (N, 3, H, W) images to (N, C, H / stride, W / stride) by stage."""
        features: Dict[str, Tensor] = self.body(x)  # noqa: UP006
        for stage in self._channels_last:  # of Swin transformers
            features[stage] = features[stage].permute(0, 3, 1, 2)
        return features

    @property
    def size_divisibility(self) -> int:
        return 32


def _build_model(name, weights):
    option = "MODEL.TORCHVISION.WEIGHTS"
    networks.check_torchvision_name(name, "MODEL.TORCHVISION.NAME")
    named_file = networks.is_file(weights)
    if weights and not named_file:
        member = networks.torchvision_weights(name, weights, option)
        # Torchvision loads them again by a pickle that may run code, which these then do not.
        networks.torchvision_state(member, f"{option} '{weights}'")
        return torchvision.models.get_model(name, weights=member)
    # As with torchvision's own weights, because a trained model is built without them.
    options = {"transform_input": True} if name in networks.TRANSFORM_INPUT else {}
    model = networks.make_torchvision(name, options)
    if named_file:
        _load_file(model, name, weights, option)
    return model


def _load_file(model, name, weights, option):
    def in_head(key):
        return key.split(".")[0] in networks.HEADS

    # The classifier is not used, so its size (the number of classes) may differ.
    state = {k: v for k, v in networks.state_of_file(weights, option).items() if not in_head(k)}
    state |= {k: v for k, v in model.state_dict().items() if in_head(k)}
    missing, unexpected, shapes = networks.differences(model.state_dict(), state)
    if missing or unexpected or shapes:
        raise ValueError(
            f"{option} '{weights}' is not a state dict of {name}: missing "
            f"{missing or 'none'}, unexpected {unexpected or 'none'}, misshaped {shapes or 'none'}."
        )
    model.load_state_dict(state, strict=False)


class _Map(NamedTuple):
    stride: int | None
    channels: int
    channels_last: bool


@torch.no_grad()
def _feature_maps(model):
    """dict[str, _Map | None] of all graph nodes in the order in which they run, by one forward."""
    # Not the 224 of classification: a map pooled to a fixed 7 x 7 would look like stride 32.
    size = 256
    _, nodes = get_graph_node_names(model)
    with eval_mode(model):
        extractor = create_feature_extractor(model, return_nodes=nodes)
        try:
            features = extractor(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{type(model).__name__} of MODEL.TORCHVISION.NAME does not take images of "
                f"{size} x {size} ({error}). A detector needs a model for any image size."
            ) from error
    return {node: _map_of(features[node], size) for node in nodes}


def _map_of(feature, size):
    if not isinstance(feature, Tensor) or feature.dim() != 4:
        return None
    _, a, b, c = feature.shape
    # N, C, H, W has square b x c; N, H, W, C has square a x b (never both at these sizes, as no
    # stage has as many channels as rows unless it is square in both ways).
    channels_last = b != c and a == b
    rows, channels = (a, c) if channels_last else (b, a)
    return _Map(size // rows if rows and size % rows == 0 else None, channels, channels_last)


def _nodes_by_stride(model, maps, stages=STAGE_OF_STRIDE):
    """
    Return each stage's graph node: the last one before the block that halves the resolution (whose
    first layers still have the old one, but are no output of a stage).
    """
    nodes, strides = list(maps), [m and m.stride for m in maps.values()]
    found = {}
    for stride, stage in stages.items():
        end = next((i for i, s in enumerate(strides) if s and s > stride), len(strides))
        block = _block_of(model, nodes[end]) if end < len(strides) else None
        for node, s in zip(nodes[:end], strides):
            if s == stride and not (block and node.startswith(f"{block}.")):
                found[stage] = node
    return found


def _block_of(model, node):
    """Return the name of the outermost module around a graph node that is not a mere sequence."""
    names, module = [], model
    for name in node.split("."):
        if not hasattr(module, name):  # the last part may be an operation instead of a module
            break
        names.append(name)
        module = getattr(module, name)
        if not isinstance(module, nn.Sequential):
            break
    return ".".join(names)


def _choose_nodes(name, maps, automatic, out_features, nodes):
    stages = list(STAGE_OF_STRIDE.values())
    if unknown := [f for f in out_features if f not in stages]:
        raise ValueError(f"{name}: no stage {unknown}: a torchvision backbone has {stages}.")
    if nodes:
        _check_nodes(name, maps, out_features, nodes)
        return dict(zip(out_features, nodes))
    if missing := [f for f in out_features or stages if f not in automatic]:
        raise ValueError(
            f"MODEL.TORCHVISION.NAME '{name}' has no feature maps for {missing}; it has "
            f"{sorted(automatic) or 'none'}. Vision transformers keep one resolution: choose a "
            "hierarchical model (or name its nodes in MODEL.TORCHVISION.NODES)."
        )
    return {stage: automatic[stage] for stage in out_features or stages}


def _check_nodes(name, maps, out_features, nodes):
    if len(nodes) != len(out_features):
        raise ValueError(
            f"MODEL.TORCHVISION.NODES has {len(nodes)} entries for the {len(out_features)} "
            f"stages {list(out_features)}: name one node for each."
        )
    if unknown := [n for n in nodes if n not in maps]:
        raise ValueError(
            f"MODEL.TORCHVISION.NODES: {name} has no node {unknown}. It has: {', '.join(maps)}."
        )
    stages = [maps[n] and STAGE_OF_STRIDE.get(maps[n].stride) for n in nodes]
    if wrong := [n for n, found, f in zip(nodes, stages, out_features) if found != f]:
        raise ValueError(
            f"MODEL.TORCHVISION.NODES: {wrong} of {name} do not have the strides of "
            f"{list(out_features)} (strides by stage: {STAGE_OF_STRIDE})."
        )


def _check_nodes_stay(body, nodes):
    """What follows a node of ``nodes`` (stage -> name) must not change it before it is read."""
    modules = dict(body.named_modules())
    outputs = next(node for node in body.graph.nodes if node.op == "output").args[0]
    for stage, node in outputs.items():
        for user in node.users:
            module = modules.get(user.target) if user.op == "call_module" else None
            if getattr(module, "inplace", False) or user.kwargs.get("inplace"):
                raise ValueError(
                    f"MODEL.TORCHVISION.NODES has '{nodes[stage]}', which '{user.name}' changes "
                    "in place: name that one."
                )


def _freeze(model, maps, nodes, freeze_at, name):
    """Freeze what the graph calls up to the node of ``res{freeze_at}``; return these nodes."""
    order = list(maps)
    if freeze_at == 1:
        nodes = {"res1": order[1], **_nodes_by_stride(model, maps, {2: "res1"})}
    if (last := nodes.get(f"res{freeze_at}")) is None:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}: {name} was built with {list(nodes)}; "
            "expected 0, 1 or the number of one of these stages."
        )
    frozen = order[: order.index(last) + 1]
    for key, parameter in model.named_parameters():
        if any(key == node or key.startswith(f"{node}.") for node in frozen):
            parameter.requires_grad = False
    return frozen


def _freeze_norm(body, path):
    """Let BatchNorm in the module at ``path`` of a traced model keep its statistics."""
    parent, _, child = path.rpartition(".")
    try:
        owner, module = body.get_submodule(parent), body.get_submodule(path)
    except AttributeError:  # the graph's node is a function
        return
    setattr(owner, child, FrozenBatchNorm2d.convert_frozen_batchnorm(module))


@BACKBONE_REGISTRY.register()
def build_torchvision_backbone(
    cfg: CfgNode, input_shape: ShapeSpec, out_features: Sequence[str] | None = None
) -> TorchvisionBackbone:
    """``cfg.MODEL.TORCHVISION``'s; see Detectron2's ``build_backbone`` for ``input_shape``."""
    if input_shape.channels != 3:
        raise ValueError(
            f"MODEL.PIXEL_MEAN has {input_shape.channels} entries: torchvision's models take 3."
        )
    options = cfg.MODEL.TORCHVISION
    return TorchvisionBackbone(
        options.NAME,
        weights=options.WEIGHTS,
        out_features=out_features or options.OUT_FEATURES,
        nodes=options.NODES,
        norm=options.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN over ``cfg.MODEL.FPN.IN_FEATURES`` of a torchvision model, as R-CNNs use it (p2-p6)."""
    bottom_up = build_torchvision_backbone(cfg, input_shape, cfg.MODEL.FPN.IN_FEATURES)
    return _fpn(cfg, bottom_up, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN over ``cfg.MODEL.FPN.IN_FEATURES`` of a torchvision model, for RetinaNet (p3-p7)."""
    bottom_up = build_torchvision_backbone(cfg, input_shape, cfg.MODEL.FPN.IN_FEATURES)
    channels = bottom_up.output_shape()["res5"].channels
    return _fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _fpn(cfg, bottom_up, top_block):
    fpn = cfg.MODEL.FPN
    return FPN(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, fpn.NORM, top_block, fpn.FUSE_TYPE)
