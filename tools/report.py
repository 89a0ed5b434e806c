#!/usr/bin/env python
# Copyright (c) The mokd_det authors.
"""As `mokd report`: see its --help."""

from mokd_det.commands import call

if __name__ == "__main__":
    call("report")
