#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""As `mokd train`: see its --help."""

from mokd_det.commands import call

if __name__ == "__main__":
    call("train")
