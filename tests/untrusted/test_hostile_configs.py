# Copyright (c) The mokd_det authors.
"""Configs that run code: only if they are trusted, or come with the installed packages."""

import os
import pathlib
import sys

import detectron2.modeling
import pytest
import yaml
from detectron2.modeling import build_model

import records
from mokd_det.config import get_cfg, load_config, trust_files
from mokd_det.config.trust import _builds_models
from mokd_det.modeling import load_lazy_config
from mokd_det.tasks import task_of

from .hostile import payload, write

APPLY = "!!python/object/apply:os.system ['touch {}']"
HUB = "def evil():\n    open({!r}, 'w')\n"


def target(call, **arguments):
    """A LazyConfig whose model is a call."""
    return yaml.safe_dump({"model": {"_target_": call, **arguments}})


def in_file(folder, name, text):
    (folder / name).write_text(text)
    return str(folder / name)


# From the folder and the marker's path to the text of a .yaml LazyConfig.
LAZY_YAML = {
    "yaml tag": lambda folder, m: f"model: {APPLY.format(m)}\n",
    "yaml tag beside it": lambda folder, m: f"model: {{a: 1}}\nother: {APPLY.format(m)}\n",
    "os.system": lambda folder, m: target("os.system", command=f"touch {m}"),
    "posix.system": lambda folder, m: target("posix.system", command=f"touch {m}"),
    "subprocess": lambda folder, m: target("subprocess.check_call", args=["touch", str(m)]),
    "pathlib": lambda folder, m: target("shutil.copy", src=__file__, dst=str(m)),
    "runpy": lambda folder, m: target(
        "runpy.run_path", path_name=in_file(folder, "x.py", f"open({str(m)!r}, 'w')")
    ),
    "module of its folder": lambda folder, m: target(
        in_file(folder, "evil_module.py", f"open({str(m)!r}, 'w')") and "evil_module.x"
    ),
    "within torch": lambda folder, m: target("torch.os.system", command=f"touch {m}"),
    "within torch.nn": lambda folder, m: target(
        "torch.nn.modules.module.torch.os.system", command=f"touch {m}"
    ),
    "torch.load": lambda folder, m: target(
        "torch.load",
        f=str(write(folder / "x.pth", "zip", payload("os.system", m))),
        weights_only=False,
    ),
    "weights of torchvision": lambda folder, m: target(
        "torchvision.models.resnet.ResNet18_Weights.IMAGENET1K_V1.get_state_dict",
        model_dir=str(write(folder / "x.pth", "zip", payload("os.system", m)).parent),
        file_name="x.pth",
        weights_only=False,
    ),
    "torch.hub": lambda folder, m: target(
        "torch.hub.load",
        repo_or_dir=str(pathlib.Path(in_file(folder, "hubconf.py", HUB.format(str(m)))).parent),
        model="evil",
        source="local",
    ),
    "detectron2's configs": lambda folder, m: target(
        "detectron2.config.LazyConfig.load",
        filename=in_file(folder, "y.py", f"open({str(m)!r}, 'w')"),
    ),
    "nested": lambda folder, m: yaml.safe_dump(
        {
            "model": {
                "_target_": "torch.nn.Identity",
                "args": [{"_target_": "os.system", "command": f"touch {m}"}],
            }
        }
    ),
    "by reference": lambda folder, m: yaml.safe_dump(
        {
            "name": "os.system",
            "model": {"_target_": "${name}", "command": f"touch {m}"},
        }
    ),
    "a target's target": lambda folder, m: yaml.safe_dump(
        {"model": {"_target_": {"_target_": "os.system", "command": f"touch {m}"}}}
    ),
}


def build_lazy(path, overrides=()):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "LazyConfigDetector", "cpu"
    cfg.MODEL.LAZY_CONFIG.FILE, cfg.MODEL.LAZY_CONFIG.OVERRIDES = str(path), list(overrides)
    build_model(cfg)


def teacher_of(path, overrides=()):
    cfg = get_cfg()
    (path.parent / "teacher.pth").touch()
    cfg.MOKD.TEACHER.CONFIG_FILE = str(path)
    cfg.MOKD.TEACHER.WEIGHTS = str(path.parent / "teacher.pth")
    cfg.MOKD.TEACHER.OPTS = list(overrides)
    task_of(cfg).build_teacher(cfg)


PYTHON = {
    "at the top": "import os\nos.system('touch {}')\nmodel = {{}}\n",
    "by a neighbour": "from .neighbour import model\n",
    "as a call": "from detectron2.config import LazyCall\nimport os\n"
    "model = LazyCall(os.system)(command='touch {}')\n",
}


def python_config(name, tmp_path, marker):
    (tmp_path / "neighbour.py").write_text(PYTHON["at the top"].format(marker))
    (tmp_path / "evil.py").write_text(PYTHON[name].format(marker))
    return tmp_path / "evil.py"


@pytest.mark.bad_input
@pytest.mark.parametrize("door", [build_lazy, teacher_of])
@pytest.mark.parametrize("name", PYTHON)
def test_python_configs(name, door, tmp_path, marker, refused):
    with refused(r"evil\.py' is a Python config, and using it runs .* add --trust"):
        door(python_config(name, tmp_path, marker))


@pytest.mark.bad_input
@pytest.mark.parametrize("name", LAZY_YAML)
def test_lazy_yaml(name, tmp_path, marker, refused, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "evil.yaml").write_text(LAZY_YAML[name](tmp_path, marker))
    with refused(r"evil\.yaml'.* add --trust"):
        build_lazy(tmp_path / "evil.yaml")


@pytest.mark.parametrize("name", [*LAZY_YAML, *PYTHON])
def test_they_are_hostile(name, tmp_path, marker, monkeypatch):
    """With --trust each of them does what it says."""
    trust_files()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    if name in PYTHON:
        path = python_config(name, tmp_path, marker)
    else:
        path = tmp_path / "evil.yaml"
        path.write_text(LAZY_YAML[name](tmp_path, marker))
    with pytest.raises(Exception):  # noqa: B017  (what comes after it is no model)
        build_lazy(path)
        raise ValueError("nothing was wrong with it")
    assert marker.exists()


@pytest.mark.bad_input
@pytest.mark.parametrize("door", [build_lazy, teacher_of])
def test_overrides_of_an_installed_config(door, tmp_path, marker, refused, monkeypatch):
    """A YAML config chooses the overrides of a Python config that needs no trust."""
    monkeypatch.setattr(detectron2, "__path__", [*detectron2.__path__])
    monkeypatch.setattr("mokd_det.config.trust._is_installed", lambda path: True)
    path = tmp_path / "installed.py"
    path.write_text("from detectron2.config import LazyCall\nfrom torch import nn\n")
    with path.open("a") as file:
        file.write("model = LazyCall(nn.Identity)()\n")
    overrides = ["model._target_=os.system", f"+model.command='touch {marker}'"]
    with refused("_target_ is 'os.system', and building the model would call it"):
        door(path, overrides)


def test_which_files_are_installed():
    """Those in the folders of the packages, however they are written."""
    from mokd_det.config.trust import _is_installed

    package = os.path.dirname(detectron2.modeling.__file__)
    assert _is_installed(os.path.join(package, "backbone", "fpn.py"))
    assert not _is_installed(os.path.join(package, "..", "..", "evil.py"))
    assert not _is_installed("evil.py") and not _is_installed("https://x/detectron2/evil.py")
    assert not _is_installed(f"{os.path.dirname(package)}_evil/evil.py")


@pytest.mark.parametrize(
    "name, fine",
    [
        ("torch.nn.Linear", True),
        ("torchvision.ops.FrozenBatchNorm2d", True),
        ("detectron2.layers.ShapeSpec", True),
        ("detectron2.modeling.meta_arch.fcos.FCOS", True),
        ("detectron2.modeling.ResNet.make_default_stages", True),
        ("detectron2.modeling.ResNet.make_stage", True),
        ("mokd_det.modeling.TorchvisionBackbone", True),
        ("torchvision.models.ResNet", True),
        ("torchvision.models.resnet.ResNet18_Weights.IMAGENET1K_V1.get_state_dict", False),
        ("torchvision.models.resnet18", False),  # its weights are a pickle in torch's cache
        ("torchvision.models.get_model", False),
        ("torchvision.models.feature_extraction.create_feature_extractor", False),
        ("torch.nn.functional.relu", False),
        ("torch.nn.Module.load_state_dict", False),
        ("detectron2.modeling.build_model", False),
        ("mokd_det.modeling.load_lazy_config", False),
        ("torch.hub.load", False),
        ("torch.jit.load", False),
        ("torch.ops.load_library", False),
        ("torch.classes.load_library", False),
        ("torch.utils.cpp_extension.load", False),
        ("torch.utils.collect_env.run", False),
        ("torch.multiprocessing.spawn", False),
        ("torch.package.PackageImporter", False),
        ("torch.nn.modules.module.functools.partial", False),
        ("torch.nn.Linear.__init__.__globals__", False),
        ("torch.nn.Module.__class__", False),
        ("torch.nn.functional", False),
        ("torch.nn.no_such_thing", False),
        ("torchvision.datasets.utils.download_and_extract_archive", False),
        ("detectron2.config.instantiate", False),
        ("detectron2.utils.registry.locate", False),
        ("detectron2.engine.launch", False),
        ("detectron2.modeling.mmdet_wrapper.MMDetBackbone", False),
        ("mokd_det.config.trust_files", False),
        ("iopath.common.file_io.PathManager", False),
        ("torchevil.nn.Linear", False),
        ("builtins.eval", False),
        ("eval", False),
        ("torch.nn.Linear\n", False),
        ("", False),
    ],
)
def test_what_builds_models(name, fine):
    assert _builds_models(name) == fine


def test_a_yaml_model_of_known_parts_needs_no_trust(tmp_path):
    path = tmp_path / "fine.yaml"
    path.write_text(target("torch.nn.Linear", in_features=2, out_features=3))
    model = load_lazy_config(str(path), ["model.out_features=4"], "FILE").model
    assert model.out_features == 4


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "text",
    ["&a {model: *a}", "model: [", "model: ${x}", "[1]", "model: 1", "\x00", "model: {a: ${"],
)
def test_broken_lazy_yaml(text, tmp_path):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.yaml"):
        build_lazy(tmp_path / "broken.yaml")


def with_base(path):
    (path.parent / "outer.yaml").write_text(f"_BASE_: {path.name}\n")
    load_config(str(path.parent / "outer.yaml"))


ORDINARY = {
    "config": lambda path: load_config(str(path)),
    "base": with_base,
    "override": lambda path: load_config("", ["MODEL.CLASSIFIER.OPTIONS", path.read_text()]),
    "study": lambda path: records.load_study(path),
}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "override",
    ["model", "~model", "model.x=${y}", "model.in_features=[", "x.y"],
)
def test_overrides_that_are_none(override, tmp_path):
    path = tmp_path / "fine.yaml"
    path.write_text(target("torch.nn.Linear", in_features=2, out_features=3))
    with pytest.raises(ValueError, match=r"fine\.yaml' with the overrides"):
        load_lazy_config(str(path), [override], "MODEL.LAZY_CONFIG.FILE")


@pytest.mark.bad_input
@pytest.mark.parametrize("door", ORDINARY)
def test_ordinary_yaml(door, tmp_path, marker, refused):
    path = tmp_path / "evil.yaml"
    path.write_text(f"MODEL: {APPLY.format(marker)}\n")
    with refused("runs Python code|MODEL.CLASSIFIER.OPTIONS|is no plain YAML"):
        ORDINARY[door](path)


STUDY = {"seeds": [1], "baseline": "a", "metrics": ["m"], "methods": {"a": {"config": "c.yaml"}}}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change, message",
    [
        ({"opts": ["--trust", "MODEL.DEVICE", "cpu"]}, "'--trust' is an option"),
        ({"methods": {"a": {"config": "c.yaml", "opts": ["--trust"]}}}, "'--trust' is an option"),
        ({"methods": {"a": {"config": "--trust"}}}, "'--trust' is an option"),
        ({"teacher": ["--trust"]}, "'--trust' is an option"),
        ({"seeds": ["1/../../../evil"]}, "expected a list of integers"),
        ({"methods": {"a": {"config": "c", "seeds": ["/evil"]}}}, "expected a list of integers"),
        ({"name": "x"}, "unknown"),
    ],
)
def test_studies_cannot_trust_themselves(change, message, tmp_path, marker, refused):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**STUDY, **change}))
    with refused(message):
        records.load_study(tmp_path / "study.yaml")
