# Copyright (c) The mokd_det authors.
"""Any torchvision classification model as a Detectron2 backbone, alone or with FPN."""

import contextlib
import logging
import warnings
from collections.abc import Sequence
from typing import Any, Dict, List  # noqa: UP035  (TorchScript)

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

logger = logging.getLogger(__name__)

# Detectron2's names for the stages of a backbone, by their stride.
STAGE_OF_STRIDE = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}


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
            name: as in ``torchvision.models.list_models(torchvision.models)``.
            weights: "" for random; a weight enum's name or "DEFAULT", which torchvision
                downloads; or a file with a state dict of the whole classification model.
            out_features: wanted stages, among "res2" ... "res5". Empty: all.
            nodes: graph nodes to read the wanted stages at, one for each of ``out_features``.
                Empty: the last four-dimensional node of each stride.
            norm: "BN", or "FrozenBN" to keep the statistics and affine of the weights.
            freeze_at: as Detectron2's ``MODEL.BACKBONE.FREEZE_AT``: stages up to
                ``res{freeze_at}`` do not train, and their BatchNorm keeps its statistics (1: the
                layers of stride 2 before the stage of stride 4; the first layer, if it has that
                stride itself). 0 trains all.

        Raises:
            ValueError: unknown name, weights, stage, node or norm; the message has the choices.
        """
        super().__init__()
        if norm not in ("BN", "FrozenBN"):
            raise ValueError(f"MODEL.TORCHVISION.NORM is '{norm}': expected 'BN' or 'FrozenBN'.")
        model = _build_model(name, weights)
        automatic = _nodes_by_stride(model)
        chosen = _choose_nodes(model, name, automatic, tuple(out_features), tuple(nodes))
        shapes = _shapes(model, list(chosen.values()))
        frozen = _freeze(model, {**automatic, **chosen}, freeze_at, name) if freeze_at else []
        self.body = create_feature_extractor(
            model, return_nodes={node: stage for stage, node in chosen.items()}
        )
        _check_nodes_stay(self.body, chosen)
        if norm == "FrozenBN":
            # After tracing: the tracer takes torch's own normalisation only as one node.
            self.body = FrozenBatchNorm2d.convert_frozen_batchnorm(self.body)
        for path in frozen:
            _freeze_norm(self.body, path)
        self._channels_last = [n for n, s in zip(chosen, shapes) if s["channels_last"]]
        self._out_features = list(chosen)
        self._out_feature_channels = {n: s["channels"] for n, s in zip(chosen, shapes)}
        self._out_feature_strides = {n: s["stride"] for n, s in zip(chosen, shapes)}

    def forward(self, x: Tensor) -> Dict[str, Tensor]:  # noqa: UP006  (TorchScript)
        """
        Args:
            x: (N, 3, H, W), normalised images.

        Returns:
            Stage name -> (N, C, H / stride, W / stride).
        """
        features: Dict[str, Tensor] = self.body(x)  # noqa: UP006
        for stage in self._channels_last:
            # Swin transformers keep their channels in the last dimension.
            features[stage] = features[stage].permute(0, 3, 1, 2)
        return features

    @property
    def size_divisibility(self) -> int:
        return 32


def _build_model(name, weights):
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(
            f"MODEL.TORCHVISION.NAME is '{name}': expected a classification model of torchvision "
            f"{torchvision.__version__}: {', '.join(known)}."
        )
    enum_names = [w.name for w in torchvision.models.get_model_weights(name)]
    # torchvision's googlenet and inception have heads for training only, useless here. They take
    # images under the others' normalisation, as with torchvision's own weights: a trained model is
    # built without these, and has to be the same.
    options = {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": True, "transform_input": True}
    if weights == "" or PathManager.isfile(weights):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*weight initialization.*")
            model = torchvision.models.get_model(name, weights=None, **options)
        if weights:
            _load_file(model, name, weights)
        return model
    if weights != "DEFAULT" and weights not in enum_names:
        raise ValueError(
            f"MODEL.TORCHVISION.WEIGHTS is '{weights}': neither a file nor one of '', 'DEFAULT', "
            f"{', '.join(map(repr, enum_names))} for {name}. On a machine without internet, "
            "name a local file (datasets/prepare_pretrained.py fetches MobileNetV2's)."
        )
    return torchvision.models.get_model(name, weights=weights)


def _load_file(model, name, weights):
    state = torch.load(PathManager.get_local_path(weights), map_location="cpu", weights_only=True)
    expected = model.state_dict()
    # The classifier is not used, so its size (the number of classes) may differ.
    head = {key for key in expected if key.split(".")[0] in ("classifier", "fc", "head", "heads")}
    missing = sorted(expected.keys() - state.keys() - head)
    unexpected = sorted(
        k
        for k in state.keys() - expected.keys()
        if k.split(".")[0] not in ("classifier", "fc", "head", "heads")
    )
    shapes = sorted(
        k for k in expected.keys() & state.keys() - head if expected[k].shape != state[k].shape
    )
    # The counter of batches came with torch 0.4.1; older files lack it and need it for nothing.
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    if missing or unexpected or shapes:
        raise ValueError(
            f"MODEL.TORCHVISION.WEIGHTS '{weights}' is not a state dict of {name}: missing "
            f"{missing or 'none'}, unexpected {unexpected or 'none'}, other shape "
            f"{shapes or 'none'}."
        )
    model.load_state_dict({k: v for k, v in state.items() if k not in head}, strict=False)


@torch.no_grad()
def _shapes(model, nodes):
    """Channels and stride of graph nodes, by one forward of zeros."""
    # Not the 224 of classification: a map pooled to a fixed 7 x 7 would look like stride 32.
    size = 256
    with _eval_mode(model):
        extractor = create_feature_extractor(model, return_nodes=nodes)
        try:
            features = extractor(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{type(model).__name__} of MODEL.TORCHVISION.NAME does not take images of "
                f"{size} x {size} ({error}). A detector needs a model for any image size."
            ) from error
    found: list[dict[str, Any] | None] = []
    for node in nodes:
        feature = features[node]
        if not isinstance(feature, torch.Tensor) or feature.dim() != 4:
            found.append(None)
            continue
        _, a, b, c = feature.shape
        # N, C, H, W has square b x c; N, H, W, C has square a x b (never both at these sizes,
        # as no stage has as many channels as rows unless it is square in both ways).
        channels_last = b != c and a == b
        rows, channels = (a, c) if channels_last else (b, a)
        found.append(
            {
                "stride": size // rows if rows and size % rows == 0 else None,
                "channels": channels,
                "channels_last": channels_last,
            }
        )
    return found


def _nodes_by_stride(model, stages=None):
    """
    Return the graph node of each stage (a dict as ``STAGE_OF_STRIDE``), by stage name: the last one
    before the block that halves the resolution (whose first layers still have the old one, but are
    no output of a stage).
    """
    _, graph_nodes = get_graph_node_names(model)
    strides = [shape and shape["stride"] for shape in _shapes(model, graph_nodes)]
    found = {}
    for stride, stage in (stages or STAGE_OF_STRIDE).items():
        end = next((i for i, s in enumerate(strides) if s and s > stride), len(strides))
        block = _block_of(model, graph_nodes[end]) if end < len(strides) else None
        for node, s in zip(graph_nodes[:end], strides):
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


def _choose_nodes(model, name, automatic, out_features, nodes):
    stages = list(STAGE_OF_STRIDE.values())
    if unknown := [f for f in out_features if f not in stages]:
        raise ValueError(f"{name}: no stage {unknown}: a torchvision backbone has {stages}.")
    if nodes:
        _, graph_nodes = get_graph_node_names(model)
        if len(nodes) != len(out_features):
            raise ValueError(
                f"MODEL.TORCHVISION.NODES has {len(nodes)} entries for the {len(out_features)} "
                f"stages {list(out_features)}: name one node for each."
            )
        if unknown := [n for n in nodes if n not in graph_nodes]:
            raise ValueError(
                f"MODEL.TORCHVISION.NODES: {name} has no node {unknown}. "
                f"It has: {', '.join(graph_nodes)}."
            )
        shapes = _shapes(model, list(nodes))
        wrong = [
            n
            for n, stage, s in zip(nodes, out_features, shapes)
            if s is None or STAGE_OF_STRIDE.get(s["stride"]) != stage
        ]
        if wrong:
            raise ValueError(
                f"MODEL.TORCHVISION.NODES: {wrong} of {name} do not have the strides of "
                f"{list(out_features)} (strides by stage: {STAGE_OF_STRIDE})."
            )
        return dict(zip(out_features, nodes))
    if missing := [f for f in out_features or stages if f not in automatic]:
        raise ValueError(
            f"MODEL.TORCHVISION.NAME '{name}' has no feature maps for {missing}; it has "
            f"{sorted(automatic) or 'none'}. Vision transformers keep one resolution: choose a "
            "hierarchical model (or name its nodes in MODEL.TORCHVISION.NODES)."
        )
    return {stage: automatic[stage] for stage in out_features or stages}


def _check_nodes_stay(body, nodes):
    """
    Raise ValueError if what follows a node of ``nodes`` (stage -> name) changes it in place, before
    it is read from the traced ``body``.
    """
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


def _freeze(model, nodes, freeze_at, name):
    """
    Freeze every module that the graph calls up to the node of stage ``res{freeze_at}``; return
    the names of these nodes.
    """
    _, graph_nodes = get_graph_node_names(model)
    if freeze_at == 1:
        last = _nodes_by_stride(model, {2: "stem"}).get("stem", graph_nodes[1])
    else:
        last = nodes.get(f"res{freeze_at}")
    if last is None:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}: {name} was built with {list(nodes)}; "
            "expected 0, 1 or the number of one of these stages."
        )
    frozen = tuple(graph_nodes[: graph_nodes.index(last) + 1])
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


@contextlib.contextmanager
def _eval_mode(model):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@BACKBONE_REGISTRY.register()
def build_torchvision_backbone(
    cfg: CfgNode, input_shape: ShapeSpec, out_features: Sequence[str] | None = None
) -> TorchvisionBackbone:
    """
    Build a :class:`TorchvisionBackbone` from ``cfg.MODEL.TORCHVISION``. For ``input_shape`` see
    Detectron2's ``build_backbone``; ``out_features`` defaults to
    ``cfg.MODEL.TORCHVISION.OUT_FEATURES``.
    """
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


def _build_fpn(cfg, input_shape, top_block):
    in_features = cfg.MODEL.FPN.IN_FEATURES
    bottom_up = build_torchvision_backbone(cfg, input_shape, out_features=in_features)
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block(bottom_up),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN over ``cfg.MODEL.FPN.IN_FEATURES`` of a torchvision model, as R-CNNs use it (p2-p6)."""
    return _build_fpn(cfg, input_shape, lambda bottom_up: LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN over ``cfg.MODEL.FPN.IN_FEATURES`` of a torchvision model, for RetinaNet (p3-p7)."""

    def top_block(bottom_up):
        channels = bottom_up.output_shape()["res5"].channels
        return LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS)

    return _build_fpn(cfg, input_shape, top_block)
