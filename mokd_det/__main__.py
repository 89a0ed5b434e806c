# Copyright (c) The mokd_det authors.
"""``python -m mokd_det`` is ``mokd``: torchrun starts modules, not commands."""

from mokd_det.commands.main import main

if __name__ == "__main__":
    main()
