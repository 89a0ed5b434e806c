# Copyright (c) The mokd_det authors.
"""Whether an exported model returns what its source returns."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Compare = Callable[[Any, Any], dict[str, float]]

DEFAULT_TOLERANCE = 1e-3  # of a score, probability or logit (of logits beyond 1: relative)
PIXELS = 10  # a box or keypoint may differ by this many times the tolerance, in pixels


def compare_detections(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """
    Match the detections (see :mod:`mokd_det.export.detector`) of one image: each with the closest
    box of its class.

    Returns:
        ``unmatched``, the number of detections that only one side has, and the largest difference
        of each output in the matched ones; of ``classes`` none.
    """
    expected, found = ({k: v.cpu() for k, v in side.items()} for side in (expected, found))
    mine, theirs = (torch.tensor(side, dtype=torch.long) for side in _match(expected, found))
    count = max(len(expected["scores"]), len(found["scores"]))
    differences: dict[str, float] = {"unmatched": count - len(mine)}
    for name in expected:
        if name == "classes":
            continue
        a, b = expected[name], found[name]
        if name != "sem_seg":  # the one that is not by detection
            a, b = a[mine], b[theirs]
        differences[name] = _largest(a, b)
    return differences


def _match(expected: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[list[int], list[int]]:
    """Return indices of detections that belong together, of both sides."""
    same_classes = expected["classes"].tolist() == found["classes"].tolist()
    # In order, unless equal scores changed places.
    if same_classes and _largest(expected["boxes"], found["boxes"]) < 1:
        everything = list(range(len(found["classes"])))
        return everything, everything
    mine: list[int] = []
    theirs: list[int] = []
    free = torch.ones(len(found["classes"]), dtype=torch.bool)
    for i, (box, label) in enumerate(zip(expected["boxes"], expected["classes"])):
        candidates = (free & (found["classes"] == label)).nonzero()[:, 0]
        if not len(candidates):
            continue
        distances = (found["boxes"][candidates] - box).abs().amax(dim=1)
        best = int(distances.argmin())
        # Farther away it is another object's.
        if distances[best] <= 0.25 * (box[2:] - box[:2]).min():
            free[candidates[best]] = False
            mine.append(i)
            theirs.append(int(candidates[best]))
    return mine, theirs


def compare_tensors(expected: Any, found: Any) -> dict[str, float]:
    """
    Return ``outputs``, the largest difference of any element of two like nestings of tensors,
    relative to a tensor's largest absolute value beyond 1 (float32 has seven digits).
    """
    mine, theirs = (torch.utils._pytree.tree_leaves(side) for side in (expected, found))
    if len(mine) != len(theirs):
        return {"outputs": float("inf")}
    relative = [_largest(a, b) / max(1.0, float(a.abs().max())) for a, b in zip(mine, theirs)]
    return {"outputs": max(relative)}


def _largest(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    difference = (a.to(torch.float32) - b.to(torch.float32).to(a.device)).abs().max()
    # A NaN on both sides is as good as a failure: nobody can use it.
    return float(difference) if difference.isfinite() else float("inf")


def parity(
    expected: list, found: list, inputs: Sequence[Tensor], tolerance: float, compare: Compare
) -> dict[str, Any]:
    """
    Args:
        expected, found: outputs of the model and of its export, for each input.
        tolerance: see ``DEFAULT_TOLERANCE`` and ``PIXELS``.
        compare: :func:`compare_detections` or :func:`compare_tensors`.

    Returns:
        ``passed`` (bool), ``tolerance``, ``sizes`` of the inputs, and the largest
        ``max_..._difference`` of each output over them. For detections also their number, how many
        are ``unmatched`` and whether there was an image ``without_detections``.
    """
    worst: dict[str, float] = {}
    unmatched: float = 0
    for mine, theirs in zip(expected, found):
        differences = compare(mine, theirs)
        unmatched += differences.pop("unmatched", 0)
        for name, value in differences.items():
            worst[name] = max(worst.get(name, 0.0), value)
    limits = {"boxes": PIXELS * tolerance, "keypoints": PIXELS * tolerance}
    passed = not unmatched and all(v <= limits.get(name, tolerance) for name, v in worst.items())
    result: dict[str, Any] = {"tolerance": tolerance, "sizes": [list(x.shape) for x in inputs]}
    result.update({f"max_{name}_difference": value for name, value in worst.items()})
    if compare is compare_detections:
        counts = [len(outputs["scores"]) for outputs in expected]
        result.update(detections=sum(counts), unmatched=unmatched, without_detections=0 in counts)
        passed = passed and any(counts)  # without any, nothing was compared
    return {"passed": passed, **result}
