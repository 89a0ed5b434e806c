# Copyright (c) The mokd_det authors.
"""What the heads of a detector say, in one form for every family."""

from .. import compat  # first: patches Detectron2 where it needs it
from .anchors import AnchorOutputs, RPNReader, build_rpn_reader, build_rpn_readers, stock_rpn
from .boxes import BoxOutputs, BoxReader
from .build import build_box_reader
from .torchvision import feature_shapes, is_torchvision
