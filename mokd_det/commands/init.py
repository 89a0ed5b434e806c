# Copyright (c) The mokd_det authors.
"""
Write the configs of a distillation on your own data, ready to train: the student from scratch, the
same student with a teacher and, if the teacher is a name, the one that trains it on the data first.

Examples:
  mokd init --teacher r50-faster-rcnn --student r18-retinanet --data train.json images/ \\
      --val val.json images/ --output cells
  mokd init --teacher my_teacher.yaml --teacher-weights output/model_final.pth \\
      --student ssdlite --data train.json images/
  mokd init --teacher mobilenet-faster-rcnn --student small-faster-rcnn --no-download \\
      --data train.json images/
  mokd init --teacher resnet50 --student mobilenet_v3_small --data photos/train --val photos/val
  mokd init --teacher output/resnet50/model_final.pth --student timm.mobilenetv3_small_100 \\
      --data photos/train

Detectors have a JSON file in COCO's format and a folder of images as data. Students, from
ImageNet's weights: r18-retinanet, r50-retinanet, mobilenet-retinanet, r18-faster-rcnn,
r50-faster-rcnn, mobilenet-faster-rcnn, small-faster-rcnn (3 million parameters), and torchvision's
ssdlite and tv-mobilenet-faster-rcnn. Teachers by name: r50-retinanet, r101-retinanet,
r50-faster-rcnn, r101-faster-rcnn (Detectron2's of COCO), any detector of torchvision, such as
retinanet_resnet50_fpn_v2, and the other students. 12 epochs, but at least 1,500 steps; the rate
falls after 2/3 and 8/9 of them, as in Detectron2's "1x". Four images a step for each GPU (on a CPU
four, of at most 320 pixels, with fewer regions); the learning rate is that of the model's own
recipe, scaled with the batch (Goyal et al. 2017).

Classifiers have a folder with a folder of images for each class. Students and teachers by name: any
classifier of torchvision, timm.X for timm's X, or one that --import registers; from ImageNet's
weights where there are any. 20 epochs with a cosine, but at least 500 steps, of 64 images for each
GPU (on a CPU 32, of at most 128 pixels), by SGD; networks with LayerNorm by AdamW. A teacher by
name is ready as it is with --teacher-weights of yours, or if the folders are those of ImageNet
(then 100 epochs).

Any teacher may be the config file of your own one, or the model_final.pth of a run. Change what you
like in common.yaml and in each config.
"""

import argparse

from ..command_line import add_debug, add_imports, positive


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help="a name, a config file or a checkpoint")
    parser.add_argument(
        "--teacher-weights", default="", help="of a config file (its OUTPUT_DIR/model_final.pth)"
    )
    parser.add_argument("--student", required=True, help="a name")
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="PATH", help="JSON IMAGES or FOLDER"
    )
    parser.add_argument("--val", nargs="+", metavar="PATH", help="the same, to evaluate on")
    parser.add_argument("--epochs", type=positive, help="of all runs (see above)")
    parser.add_argument(
        "--no-download",
        action="store_true",
        help="detectors: MobileNetV2's weights from datasets/prepare_pretrained.py; classifiers: "
        "begin with random weights (for 100 epochs, if not --epochs)",
    )
    parser.add_argument("--output", default="", help="new folder (mokd_STUDENT)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace configs in --output; its runs stay"
    )
    parser.add_argument("--trust", action="store_true", help="run the code in config files")
    add_imports(parser)
    add_debug(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the configs, and print the commands that train them."""
    from ..config import trust_files
    from .new_project import create

    trust_files(args.trust)
    create(args)
