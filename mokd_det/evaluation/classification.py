# Copyright (c) The mokd_det authors.
"""Top-1 and top-5 accuracy."""

import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from ..data.classification import Batch

logger = logging.getLogger(__name__)

TOP = 5


class ClassificationEvaluator(DatasetEvaluator):
    """
    Accuracy in percent on a registered set. With several processes every image counts once: each
    has its own share of them, and predictions are gathered.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, per_class: bool = False):
        """
        Args:
            output_dir: folder for ``predictions.json``, a list with ``name``, ``label``,
                ``classes`` (the most probable first) and their ``scores`` for every image.
            per_class: also ``top1-<class>`` for every class.
        """
        self.dataset_name, self.output_dir, self.per_class = dataset_name, output_dir, per_class
        self.reset()

    def reset(self) -> None:
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: Batch, outputs: Tensor) -> None:
        """Take the (N, C) logits of a batch with names, whose targets are labels."""
        # Of the logits: their softmax rounds close ones to ties.
        classes = outputs.topk(min(TOP, outputs.shape[1]), dim=1).indices
        scores = outputs.float().softmax(dim=1).gather(1, classes)
        rows = zip(inputs.names, inputs.targets.tolist(), classes.tolist(), scores.tolist())
        self._predictions += [dict(zip(("name", "label", "classes", "scores"), r)) for r in rows]

    def evaluate(self) -> dict[str, dict[str, float]]:
        """
        Return ``{"classification": {"top1", "top5" (with more than 5 classes), "images"
        (evaluated), "skipped" (not readable)}}`` in the first process; ValueError: no image at all.
        """
        comm.synchronize()
        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return {}
        predictions = list(itertools.chain(*gathered))
        if not predictions:
            raise ValueError(f"'{self.dataset_name}' has no image that could be evaluated.")
        labels = torch.tensor([p["label"] for p in predictions])
        right = torch.tensor([p["classes"] for p in predictions]) == labels[:, None]
        top1 = right[:, 0].double()
        said = {p["classes"][0] for p in predictions}
        if len(said) == 1 and len(labels.unique()) > 1:
            logger.warning(
                f"Every image of '{self.dataset_name}' got the same class. After a short training "
                "that may be BatchNorm: its running statistics follow slowly (momentum 0.01 in "
                "MobileNetV3), and evaluation reads them. Set TEST.PRECISE_BN.ENABLED True, or "
                "train longer."
            )
        source = DatasetCatalog.get(self.dataset_name)
        results: dict[str, float] = {"top1": 100 * top1.mean().item()}
        if len(source.classes) > TOP:
            results["top5"] = 100 * right.any(dim=1).double().mean().item()
        results["images"] = len(predictions)
        results["skipped"] = len(source) - len(predictions)
        if results["skipped"]:
            logger.warning(
                f"{results['skipped']} images of '{self.dataset_name}' could not be read and do "
                "not count."
            )
        if self.per_class:
            for label in labels.unique().tolist():
                mean = top1[labels == label].mean().item()
                results[f"top1-{source.classes[label]}"] = 100 * mean
            rows = [f"{k[5:]}: {v:.2f}" for k, v in results.items() if k.startswith("top1-")]
            logger.info(f"Top-1 of every class of '{self.dataset_name}':\n" + "\n".join(rows))
        if self.output_dir:
            os.makedirs(self.output_dir, exist_ok=True)
            Path(self.output_dir, "predictions.json").write_text(json.dumps(predictions))
        return {"classification": results}
