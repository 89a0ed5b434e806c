# Copyright (c) The mokd_det authors.
"""Knowledge distillation for Detectron2 and torchvision, as multi-objective optimisation."""

__version__ = "0.2.0"
