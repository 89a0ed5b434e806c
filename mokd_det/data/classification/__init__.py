# Copyright (c) The mokd_det authors.
"""Images with one label each: data sets, augmentation, batches and loaders."""

from .batch import Batch
from .loader import build_test_loader, build_train_loader
from .sources import ClassFolders, PackedImages, check_source, open_source, write_packed
from .transforms import AUTO_AUGMENTS, CROPS, INTERPOLATIONS, BatchMixing, build_transform
