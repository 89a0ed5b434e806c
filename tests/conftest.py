# Copyright (c) The mokd_det authors.
import os

import torch

import mokd_det  # noqa: F401  (first: mends Detectron2 where it needs it)

# Sums are split over threads, so a fixed number of them makes float results repeatable.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
