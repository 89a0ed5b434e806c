# Copyright (c) The mokd_det authors.
"""A TorchScript file as the teacher."""

import pytest
import torch
from torch import nn

from mokd_det.engine import DistillationTrainer, build_trainer, validate

from ..conftest import OUTPUTS
from ..modeling.families import batch_of, step
from .helpers import OneConvolution, build_teacher, script_opts


class Maps(nn.Module):
    """The teacher's backbone as a network of somebody else's: dict of tensors in, nothing else."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x)


def scripted(module, path, size=64):
    with torch.no_grad():
        torch.jit.trace(module.eval(), torch.zeros(1, 3, size, size), strict=False).save(path)
    return str(path)


def test_it_is_the_teacher_that_it_was_made_from(make_cfg, tmp_path):
    """Its normalisation and channel order are those of the options (here RGB, ImageNet's)."""
    cfg = make_cfg("mokd")
    original = build_teacher(cfg)
    path = scripted(Maps(original.model.backbone), tmp_path / "t.ts")
    loaded = build_teacher(make_cfg("mokd", script_opts(path)))
    shapes = original.feature_shapes()
    assert {n: (s.stride, s.channels) for n, s in loaded.feature_shapes().items()} == {
        n: (s.stride, s.channels) for n, s in shapes.items()
    }
    batch = batch_of(cfg)
    wanted, got = (t.run(batch, "BGR").features for t in (original, loaded))
    for name in wanted:
        assert torch.allclose(wanted[name], got[name], atol=1e-4), name
    opts = [*script_opts(path), "SOLVER.MAX_ITER", 1, "DATASETS.TEST", ()]
    trainer = build_trainer(make_cfg("mokd", opts))
    trainer.resume_or_load(False)
    trainer.train()
    assert "loss_features" in trainer.storage.latest()
    # Only its features are there to be distilled, and it is compiled already.
    with pytest.raises(ValueError, match="a ScriptedDetector, cannot be read.*'outputs' in MOKD.O"):
        build_teacher(make_cfg("mokd", [*script_opts(path), *OUTPUTS]))
    with pytest.raises(ValueError, match="a TorchScript file is compiled already"):
        build_teacher(make_cfg("mokd", [*script_opts(path), "MOKD.TEACHER.COMPILE", "aot_eager"]))


def test_a_frozen_one_has_no_parameters(make_cfg, tmp_path):
    torch.jit.freeze(torch.jit.script(OneConvolution().eval())).save(tmp_path / "f.ts")
    opts = [*script_opts(str(tmp_path / "f.ts")), "MOKD.FEATURES.STUDENT", ["p3"]]
    model = DistillationTrainer.build_model(make_cfg("mokd", opts))
    losses, _ = step(model, batch_of(make_cfg("mokd")))
    assert losses["features"]["loss_features"].isfinite()


class Tuple(nn.Module):
    def forward(self, x):
        return x, x


class Odd(nn.Module):
    def forward(self, x):
        return {"odd": x[..., :-3]}


@pytest.mark.parametrize(
    "module, message",
    [(Tuple(), "but it returns a tuple"), (Odd(), r"\['odd'\] are no maps whose stride divides")],
)
def test_one_that_returns_something_else(make_cfg, tmp_path, module, message):
    path = scripted(module, tmp_path / "t.ts")
    with pytest.raises(ValueError, match=f"MOKD.TEACHER.TORCHSCRIPT.FILE must map.*{message}"):
        build_teacher(make_cfg("mokd", script_opts(path)))


def test_files_that_cannot_be(make_cfg, tmp_path):
    (tmp_path / "no.ts").write_text("no")
    with pytest.raises(ValueError, match="no.ts' is no TorchScript file"):
        build_teacher(make_cfg("mokd", script_opts(str(tmp_path / "no.ts"))))
    # Before anything is built:
    with pytest.raises(FileNotFoundError, match="TORCHSCRIPT.FILE 'none.ts' does not exist"):
        validate(make_cfg("mokd", script_opts("none.ts")))
    with pytest.raises(ValueError, match="'https://x/t.ts' is an address: download it"):
        validate(make_cfg("mokd", script_opts("https://x/t.ts")))
    with pytest.raises(ValueError, match="name two teachers"):
        validate(make_cfg("mokd", ["MOKD.TEACHER.TORCHSCRIPT.FILE", "none.ts"]))
