#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Run a TorchScript file of tools/export_model.py. Needs torch and torchvision only, so this script
can be copied to wherever the file goes.

Examples:
  python tools/run_exported.py out/model.ts photo.jpg
  python tools/run_exported.py out/model.ts photo.jpg --score 0.5 --picture found.png
  python tools/run_exported.py classifier/model.ts photo.jpg other.jpg --top 5

Prints JSON, a list with an entry for each image. A detector's has "detections": "box" (x0 y0 x1 y1
in pixels of the image file), "score", "class" (number) and "name"; of a model with masks also
"mask", COCO's uncompressed run lengths (down the columns); with keypoints "keypoints", x y score
each. A classifier's has "classes", the best first: "class", "name" and "score" (probability).
"""

import argparse
import colorsys
import json
import os
import re
import sys
import warnings


def argument_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model.ts of tools/export_model.py")
    parser.add_argument("images", nargs="+", metavar="image")
    parser.add_argument("--score", type=float, default=0.0, help="smallest score (%(default)s)")
    parser.add_argument("--top", type=int, default=5, help="classes shown (%(default)s)")
    parser.add_argument("--picture", help="PNG or JPEG to write, of one image")
    parser.add_argument("--device", default="cpu", help="a traced model's is that of its export")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":  # before torch, which --help is not to wait for
    ARGUMENTS = argument_parser().parse_args()

import torch
import torchvision  # noqa: F401  (registers operators of detectors: NMS and ROIAlign)
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks


METADATA_FILE = "metadata.json"
METADATA = f"extra/{METADATA_FILE}"
# Operators of torch and torchvision that read or write files by name.
OF_FILES = {"save", "from_file", "read_file", "write_file", "write_png", "write_jpeg"}
OF_FILES |= {"read_video_from_file", "probe_video_from_file"}
# What is taken of a file's metadata: bytes in all, classes, characters of a class; and how large it
# may make an image: side and area in pixels.
MOST_BYTES, MOST_CLASSES, MOST_CHARACTERS, LONGEST, LARGEST = 2**24, 100_000, 1000, 8192, 2**27


def load(path, device):
    """
    Returns:
        tuple: the module and its metadata.

    Raises:
        ValueError: not a file of tools/export_model.py, or traced on another kind of device.
    """
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"  # torch.jit.load also knows another format
    # torch's own: a zip archive can be made in which another reader finds other files.
    reader = torch._C.PyTorchFileReader(path) if is_archive else None
    if reader is None or METADATA not in reader.get_all_records():
        raise ValueError(
            f"{path} has no {METADATA_FILE} inside: expected a file of tools/export_model.py "
            "--format torchscript."
        )
    if reader.get_record_size(METADATA) > MOST_BYTES:
        raise ValueError(f"{path}: its {METADATA_FILE} has over {MOST_BYTES} bytes.")
    metadata = json.loads(reader.get_record(METADATA))
    traced_on = metadata.get("traced_on") if isinstance(metadata, dict) else None
    if traced_on and traced_on != torch.device(device).type:
        raise ValueError(
            f"{path} was traced on '{traced_on}' and cannot run on '{device}': give --device "
            f"{traced_on}, or export it on the other device, or with --method scripting."
        )
    check_metadata(metadata, path)
    check_program(reader, path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.* is deprecated")
        # A trace has constants on the CPU, wherever its weights are: all stay where they were.
        module = torch.jit.load(path, map_location=None if traced_on else device)
    return module, metadata


def check_program(reader, path):
    """
    Raise ValueError for operators that read or write files: exports have none. As
    mokd_det/untrusted/torchscript.py.
    """
    names = reader.get_all_records()
    for name in names:  # RuntimeError: the reader cut its name
        reader.get_record_size(name)
    if len({name.lower() for name in names}) < len(names):  # to torch, both cases are one
        raise ValueError(f"{path} has two files of one name inside.")
    for name in (name for name in names if name.lower().endswith(".py")):
        words = re.findall(r"[A-Za-z_]\w*", reader.get_record(name).decode())
        if found := sorted(OF_FILES & set(words)):
            raise ValueError(f"{path} is a program that may read or write files: '{found[0]}'.")


def check_metadata(metadata, path):
    """Raise ValueError for metadata that no export writes: they decide how much memory is used."""

    def need(is_fine, key, expected):
        if not is_fine:
            raise ValueError(f"{path}: '{key}' of its {METADATA_FILE} is not {expected}.")

    need(isinstance(metadata, dict), METADATA_FILE, "a JSON object")
    need(metadata.get("task") in ("detection", "classification"), "task", "one that is known")
    need(metadata.get("format") in ("RGB", "BGR"), "format", "'RGB' or 'BGR'")
    names = metadata.get("class_names") or []
    need(isinstance(names, list) and len(names) <= MOST_CLASSES, "class_names", "a list of classes")
    for name in names:
        is_short = isinstance(name, str) and len(name) <= MOST_CHARACTERS
        need(is_short, "class_names", f"texts of at most {MOST_CHARACTERS} characters")
    rule = metadata.get("resize")
    need(isinstance(rule, dict), "resize", "a rule")
    is_detector = metadata["task"] == "detection"
    for key in ("short_edge", "longest_edge" if is_detector else "crop"):
        least = 0 if key == "short_edge" and is_detector else 1
        most = 10**9 if key == "longest_edge" else LONGEST  # that only makes images smaller
        in_range = type(rule.get(key)) is int and least <= rule[key] <= most
        need(in_range, f"resize.{key}", f"a whole number from {least} to {most}")
    if not is_detector:
        known = [mode.value for mode in InterpolationMode]
        need(rule.get("interpolation") in known, "resize.interpolation", f"one of {known}")


def read(path):
    """
    Return the image of a file, RGB, upright as its EXIF data say; ValueError: one of 16 or 32 bits,
    which PIL would clip to white.
    """
    image = Image.open(path)
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"{path} is 16-bit, 32-bit or float (Pillow's mode '{image.mode}'): convert it to 8 "
            "bit first, as the images that the model was trained on."
        )
    return ImageOps.exif_transpose(image).convert("RGB")


def resized_size(width, height, short_edge, longest_edge):
    """
    Return (width, height) with the short edge at ``short_edge``, unless the other would exceed
    ``longest_edge``; 0 leaves the size.
    """
    if not short_edge:
        return width, height
    # In the steps of Detectron2's ResizeShortestEdge, so that rounding is the same.
    scale = short_edge / min(width, height)
    width, height = (short_edge, scale * height) if width <= height else (scale * width, short_edge)
    if max(width, height) > longest_edge:
        scale = longest_edge / max(width, height)
        width, height = scale * width, scale * height
    if width * height > LARGEST:
        raise ValueError(f"An image would become {width:.0f} x {height:.0f} pixels: crop it.")
    return int(width + 0.5), int(height + 0.5)


def to_tensor(image, metadata):
    """Return a PIL image as (3, H, W) uint8 in the channel order of the model."""
    tensor = F.pil_to_tensor(image)
    return tensor.flip(0).contiguous() if metadata["format"] == "BGR" else tensor


@torch.no_grad()
def detect(module, metadata, image, device):
    """
    Args:
        image (PIL.Image): RGB.

    Returns:
        dict[str, Tensor]: on the CPU, in pixels of ``image``: ``boxes`` (R, 4) XYXY, ``scores``
        (R,), ``classes`` (R,) and, if the model has them, ``masks`` (R, H, W) bool and
        ``keypoints`` (R, K, 3).
    """
    rule = metadata["resize"]
    width, height = resized_size(*image.size, rule["short_edge"], rule["longest_edge"])
    small = image.resize((width, height), Image.BILINEAR)
    found = module(to_tensor(small, metadata).to(device))
    scale = torch.tensor([image.width / width, image.height / height], device=device)
    boxes = found["boxes"] * scale.repeat(2)
    boxes[:, 0::2].clamp_(0, image.width)
    boxes[:, 1::2].clamp_(0, image.height)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    outputs = {"boxes": boxes, "scores": found["scores"], "classes": found["classes"]}
    outputs = {name: value[kept] for name, value in outputs.items()}
    if "masks" in found:
        outputs["masks"] = module.paste_masks(
            found["masks"][kept], outputs["boxes"], image.height, image.width
        )
    if "keypoints" in found:
        keypoints = found["keypoints"][kept]
        outputs["keypoints"] = torch.cat([keypoints[..., :2] * scale, keypoints[..., 2:]], dim=2)
    return {name: value.cpu() for name, value in outputs.items()}


@torch.no_grad()
def classify(module, metadata, image, device):
    """Return the probability of each class, a (C,) tensor, for a PIL image."""
    rule = metadata["resize"]
    image = F.resize(image, rule["short_edge"], InterpolationMode(rule["interpolation"]))
    image = F.center_crop(image, rule["crop"])
    return module(to_tensor(image, metadata)[None].to(device))[0].softmax(0).cpu()


def name_of(metadata, label):
    names = metadata["class_names"]
    return names[label] if names and 0 <= label < len(names) else str(label)


def run_lengths(mask):
    """Return an (H, W) bool mask as COCO's uncompressed run lengths."""
    flat = mask.t().flatten().int()
    edges = (flat.diff() != 0).nonzero()[:, 0] + 1
    ends = torch.cat([edges, torch.tensor([flat.numel()])])
    counts = ends.diff(prepend=torch.tensor([0])).tolist()
    # They begin with the length of the background.
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def as_records(outputs, metadata):
    """Return the outputs of :func:`detect` as a list of dicts for JSON."""
    records = []
    for i, (box, score, label) in enumerate(
        zip(outputs["boxes"].tolist(), outputs["scores"].tolist(), outputs["classes"].tolist())
    ):
        record = {"box": box, "score": score, "class": label, "name": name_of(metadata, label)}
        if "masks" in outputs:
            record["mask"] = run_lengths(outputs["masks"][i])
        if "keypoints" in outputs:
            record["keypoints"] = outputs["keypoints"][i].tolist()
        records.append(record)
    return records


def colour_of(label):
    """Return a class's own colour, as mokd_det/commands/predicting.py."""
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.9, 1))


def draw(image, outputs, metadata):
    """Return the PIL image with boxes, labels, masks and keypoints drawn on it."""
    canvas = F.pil_to_tensor(image)
    if not len(outputs["boxes"]):
        return image
    if "masks" in outputs:
        canvas = draw_segmentation_masks(canvas, outputs["masks"], alpha=0.4)
    labels = [
        f"{name_of(metadata, label)} {score:.2f}"
        for label, score in zip(outputs["classes"].tolist(), outputs["scores"].tolist())
    ]
    width = max(min(image.size) // 200, 1)
    colours = [colour_of(label) for label in outputs["classes"].tolist()]
    canvas = draw_bounding_boxes(canvas, outputs["boxes"], labels, colours, width=width)
    if "keypoints" in outputs:
        canvas = draw_keypoints(canvas, outputs["keypoints"][..., :2], radius=2 * width)
    return F.to_pil_image(canvas)


def main(args):
    for path in (args.model, *args.images):
        if not os.path.isfile(path):
            raise ValueError(f"'{path}' does not exist.")
    if args.picture and len(args.images) > 1:
        raise ValueError("--picture is of one image: give one.")
    if not 0 <= args.score <= 1:
        raise ValueError(f"--score is {args.score}: expected a number in [0, 1].")
    if args.top < 1:
        raise ValueError(f"--top is {args.top}: expected 1 or more.")
    module, metadata = load(args.model, args.device)
    if args.picture and metadata["task"] != "detection":
        raise ValueError("--picture shows boxes, which a classifier has not.")
    results = []
    for path in args.images:
        image = read(path)
        result = {"image": path, "width": image.width, "height": image.height}
        if metadata["task"] == "classification":
            scores, labels = classify(module, metadata, image, args.device).sort(descending=True)
            pairs = list(zip(scores.tolist(), labels.tolist()))[: args.top]
            result["classes"] = [
                {"class": label, "name": name_of(metadata, label), "score": score}
                for score, label in pairs
                if score >= args.score
            ]
        else:
            outputs = detect(module, metadata, image, args.device)
            kept = outputs["scores"] >= args.score
            if len(kept) and not kept.any():
                best = float(outputs["scores"].max())
                print(f"{path}: the highest score is {best:.3g} (--score)", file=sys.stderr)
            outputs = {name: value[kept] for name, value in outputs.items()}
            result["detections"] = as_records(outputs, metadata)
            if args.picture:
                draw(image, outputs, metadata).save(args.picture)
        results.append(result)
    print(json.dumps(results))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", r"torch\.meshgrid: in an upcoming")  # Detectron2's anchors
    try:
        main(ARGUMENTS)
    except (ValueError, OSError, RuntimeError, Image.DecompressionBombError) as error:
        if ARGUMENTS.debug:
            raise
        print(f"run_exported.py: {error}\n(--debug shows where)", file=sys.stderr)
        sys.exit(2)
