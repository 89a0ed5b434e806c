#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Fashion-MNIST (Xiao et al. 2017, MIT licence): 60,000 + 10,000 grey images of 28 x 28, 10 classes,
as packed files. The last 5,000 training images become the validation set.

    apt-get install dataset-fashion-mnist          # or get the four *-ubyte.gz files elsewhere
    python datasets/prepare_fashion_mnist.py
    python datasets/prepare_fashion_mnist.py --source FOLDER_OF_THE_FOUR_FILES --subset 10000

writes fashion_mnist/{train,val,test}.npz into $DETECTRON2_DATASETS (./datasets by default), and
with --subset N also train_N.npz, the first N training images.
"""

import argparse
import gzip
import json
import zlib
from pathlib import Path

import numpy as np

from mokd_det.command_line import add_debug, errors_as_messages
from mokd_det.data.classification import write_packed
from mokd_det.data.paths import datasets_root

SOURCE = "/usr/share/datasets/fashion-mnist"
CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
VALIDATION = 5000


def read_idx(path):
    """
    Args:
        path (Path): a gzipped file of uint8 in MNIST's format.

    Returns:
        ndarray

    Raises:
        FileNotFoundError, ValueError: absent, or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: apt-get install dataset-fashion-mnist, or name the folder of "
            "the four files with --source."
        )
    try:
        content = gzip.decompress(path.read_bytes())
        if content[:3] != b"\x00\x00\x08":
            raise ValueError("it does not hold unsigned bytes")
        shape = np.frombuffer(content, ">i4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is no gzipped file in MNIST's format: {error}.") from error


def prepare(source, output, subset=0):
    """
    Args:
        source, output (str or Path): folders.
        subset (int): also write this many training images for themselves; 0: no.

    Returns:
        dict[str, int]: images per file.
    """
    source, output = Path(source), Path(output)
    kinds = ("images-idx3", "labels-idx1")
    arrays = {
        part: [read_idx(source / f"{part}-{kind}-ubyte.gz") for kind in kinds]
        for part in ("train", "t10k")
    }
    images, labels = arrays["train"]
    last = len(labels) - VALIDATION
    if not 0 <= subset <= last:
        raise ValueError(f"--subset is {subset}: expected 0 (none) to {last}.")
    parts = {
        "train": (images[:last], labels[:last]),
        "val": (images[last:], labels[last:]),
        "test": tuple(arrays["t10k"]),
    }
    if subset:
        parts[f"train_{subset}"] = images[:subset], labels[:subset]
    for name, (pixels, targets) in parts.items():
        write_packed(str(output / f"{name}.npz"), pixels, targets.astype(np.int64), CLASSES)
    return {name: len(targets) for name, (_, targets) in parts.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default=SOURCE, help="folder (%(default)s)")
    parser.add_argument("--output", default=str(datasets_root() / "fashion_mnist"))
    parser.add_argument("--subset", type=int, default=0, help="also the first N training images")
    add_debug(parser)
    args = parser.parse_args()
    with errors_as_messages(args.debug):
        summary = prepare(args.source, args.output, args.subset)
        print(json.dumps({"output": args.output, **summary}, indent=2))


if __name__ == "__main__":
    main()
