#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""
Write the plain student for deployment.

Example:
  python tools/export_model.py --config-file configs/Quick-Start/student_mokd.yaml \\
      --format checkpoint --output out \\
      MODEL.WEIGHTS output/quick_start/student_mokd/model_final.pth

Formats:
  checkpoint   model.pth and config.yaml, which stock Detectron2 loads
"""

import argparse
import json

import mokd_det  # noqa: F401  (first: mends Detectron2 where it needs it)
from mokd_det import modeling  # noqa: F401  (registers the torchvision backbones)
from mokd_det.config import load_config
from mokd_det.export import export_checkpoint


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="the student's config")
    parser.add_argument("--format", choices=["checkpoint"], default="checkpoint")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    args = parser.parse_args()
    print(json.dumps(export_checkpoint(load_config(args.config_file, args.opts), args.output)))


if __name__ == "__main__":
    main()
