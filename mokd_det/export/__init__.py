# Copyright (c) The mokd_det authors.
"""The plain student, without a trace of its training."""

from .. import compat  # first: patches Detectron2 where it needs it
from .benchmark import benchmark, check_benchmark, format_benchmark
from .classifier_exporter import ClassifierExporter
from .detector_exporter import DetectorExporter
from .torchvision_exporter import TorchvisionDetectorExporter
from .export import FORMATS, METHODS, check_options, export_checkpoint, export_model
from .exporter import Exporter, ExportOptions
from .parity import DEFAULT_TOLERANCE, PIXELS
