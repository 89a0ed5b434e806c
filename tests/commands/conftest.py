# Copyright (c) The mokd_det authors.
"""Commands in this process."""

import pytest
import torch

from mokd_det.commands import init


@pytest.fixture
def run_init(tmp_path, monkeypatch, capsys):
    """From the arguments of ``mokd init`` to what it prints; without a GPU, in an own folder."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)

    def run(*args):
        init.run(init.argument_parser().parse_args(list(map(str, args))))
        return capsys.readouterr().out

    return run
