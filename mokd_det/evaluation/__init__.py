# Copyright (c) The mokd_det authors.
"""Evaluators by data set, results that a machine can read, and rows of a model zoo."""

from .. import compat  # first: patches Detectron2 where it needs it
from ..logs import read_json_lines
from .build import build_evaluator, check_evaluators
from .classification import ClassificationEvaluator
from .cost import count_parameters
from .fast_coco import fast_coco_eval
from .results import finite, format_comparison, headlines, write_results
from .zoo_row import format_zoo_row, zoo_row
