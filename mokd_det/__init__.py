# Copyright (c) The mokd_det authors.
"""Knowledge distillation for Detectron2 and torchvision, as multi-objective optimisation."""

from . import compat

__version__ = "0.1.0"

# Before anything of Detectron2 is imported: 0.6 does not import on today's NumPy and Pillow.
compat.apply()
