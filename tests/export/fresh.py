# Copyright (c) The mokd_det authors.
"""
A program, not a test: run exported files where only torch and torchvision can be imported.

    python fresh.py FOLDER    # of *.pt files, each with what one exported file should return

Prints JSON: by name of the .pt file without its ending, the largest difference of each output.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch


class Blocker:
    """Only torch and torchvision are left of what the project needs."""

    NAMES = ("detectron2", "mokd_det", "fvcore", "iopath", "cv2", "pycocotools", "omegaconf")

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.NAMES:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


def load_script(path):
    spec = importlib.util.spec_from_file_location("run_exported", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def difference(expected, found):
    if set(expected) != set(found):
        return {"names": [sorted(expected), sorted(found)]}
    result = {}
    for name, value in expected.items():
        other = found[name]
        if value.shape != other.shape or value.dtype != other.dtype:
            result[name] = f"{value.dtype} {tuple(value.shape)}, {other.dtype} {tuple(other.shape)}"
        elif value.dtype == torch.bool:  # masks: part of the pixels
            result[name] = (value != other).float().mean().item() if value.numel() else 0.0
        else:
            result[name] = (value - other).abs().max().item() if value.numel() else 0.0
    return result


@torch.no_grad()
def check(tool, case):
    module, metadata = tool.load(case["file"], "cpu")
    found = [module(image) for image in case["inputs"]]
    if not isinstance(found[0], dict):
        found = [{"logits": logits} for logits in found]
    result = {"metadata": metadata}
    result["outputs"] = [difference(a, b) for a, b in zip(case["outputs"], found)]
    if "batch" in case:
        batch = module.batch(case["inputs"][:2])
        result["batch"] = [difference(a, b) for a, b in zip(case["batch"], batch)]
    if "predictor" in case:
        outputs = tool.detect(module, metadata, tool.read(case["picture"]), "cpu")
        result["predictor"] = difference(case["predictor"], outputs)
    return result


def main():
    sys.meta_path.insert(0, Blocker())
    for name in Blocker.NAMES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        sys.exit(f"{name} can be imported")
    root = Path(__file__).resolve().parents[2]
    tool = load_script(root / "tools" / "run_exported.py")
    results = {
        path.stem: check(tool, torch.load(path, weights_only=True))
        for path in sorted(Path(sys.argv[1]).glob("*.pt"))
    }
    if loaded := [name for name in Blocker.NAMES if name in sys.modules]:
        sys.exit(f"{loaded} have been imported")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
