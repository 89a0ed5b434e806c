# In Python: student_retinanet.yaml with the quick start's teacher, as Detectron2's LazyConfig.
# Train it by mokd train --trust; in all steps the losses are those of the YAML config.
import detectron2.data.transforms as T
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, ResNet, RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from mokd_det.data import CheckedMapper, RandomChannelGain, register_coco, resumable_loader
from mokd_det.engine import distil

for _split in ("train", "val"):
    _files = [f"datasets://neon_trees/{_split}{end}" for end in (".json", "")]
    register_coco(f"neon_trees_{_split}", *_files)

train = dict(
    output_dir="output/quick_start/student_retinanet_mokd",
    max_iter=900,
    checkpointer=dict(period=100, max_to_keep=2),
    eval_period=0,  # at the end
    device="cpu",
    seed=1,
    clip_gradients=dict(clip_type="norm", clip_value=1.0),
)

# A narrow ResNet-50.
_stages = [
    L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=blocks,
        stride_per_block=[2 if i else 1] + [1] * (blocks - 1),
        in_channels=16 * 2**i,
        bottleneck_channels=8 * 2**i,
        out_channels=32 * 2**i,
        norm="BN",
        stride_in_1x1=False,
    )
    for i, blocks in enumerate((3, 4, 6, 3))
]
_student = L(RetinaNet)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=16, norm="BN"),
            stages=_stages,
            out_features=["res3", "res4", "res5"],
        ),
        in_features=["res3", "res4", "res5"],
        out_channels=64,
        top_block=L(LastLevelP6P7)(in_channels=256, out_channels="${..out_channels}"),
    ),
    head=L(RetinaNetHead)(
        input_shape=[ShapeSpec(channels=64)] * 5,
        num_classes="${..num_classes}",
        conv_dims=[64, 64],
        num_anchors=3,
    ),
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[16, 20, 25], [32, 40, 51], [64, 81, 102], [128, 161, 203], [256, 322, 406]],
        aspect_ratios=[1.0],
        strides=[8, 16, 32, 64, 128],
        offset=0.0,
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    anchor_matcher=L(Matcher)(
        thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    num_classes=1,
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    smooth_l1_beta=0.1,
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[57.375, 57.12, 58.395],
    input_format="BGR",
)

# The options of the block MOKD, in lower case.
model = L(distil)(
    student=_student,
    train="${train}",
    input_format="BGR",
    teacher=dict(
        config_file="configs/Quick-Start/teacher.yaml",
        weights="output/quick_start/teacher/model_final.pth",
        proposals=64,
    ),
)

dataloader = dict(
    train=L(resumable_loader)(
        dataset=L(get_detection_dataset_dicts)(names="neon_trees_train"),
        mapper=L(CheckedMapper)(
            broken="error",
            is_train=True,
            augmentations=[
                L(T.RandomContrast)(intensity_min=0.7, intensity_max=1.3),
                L(RandomChannelGain)(low=0.7, high=1.3),
                L(T.ResizeShortestEdge)(
                    short_edge_length=[256], max_size=256, sample_style="choice"
                ),
                L(T.RandomFlip)(),
            ],
            image_format="${model.input_format}",
        ),
        total_batch_size=6,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="neon_trees_val", filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=256, max_size=256)],
            image_format="${model.input_format}",
        ),
        num_workers=0,
    ),
    evaluator=L(COCOEvaluator)(dataset_name="${..test.dataset.names}"),
)

optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.02,
    momentum=0.9,
    weight_decay=1e-4,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[600, 800, 900]),
    warmup_length=50 / 900,
    warmup_method="linear",
    warmup_factor=0.001,
)
