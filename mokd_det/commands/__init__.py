# Copyright (c) The mokd_det authors.
"""
The ``mokd`` command. Of each subcommand ``X.py`` has the arguments (it imports nothing but Python's
own, so that ``--help`` is there at once) and another module the work.
"""

from .main import call
