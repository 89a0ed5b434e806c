# Copyright (c) The mokd_det authors.
"""Each patch of Detectron2 0.6: where it is needed, and that it leaves everything else alone."""

import json
import logging
import re
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from detectron2.layers import batched_nms_rotated
from detectron2.structures import RotatedBoxes, pairwise_iou_rotated
from PIL import Image
from pycocotools.coco import COCO

from mokd_det import compat

from .conftest import CONFIGS, ROOT, TREE_OPTS
from .test_tools import run


@pytest.fixture
def old_source(tmp_path):
    """The places of Detectron2 0.6's source that give it away."""
    for file, text in {
        "data/transforms/transform.py": "def f(interp=Image.LINEAR): ...",
        "evaluation/sem_seg_evaluation.py": "np.full(3, np.nan, dtype=np.float)",
        "export/__init__.py": "from .api import *",
    }.items():
        path = tmp_path / "old" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "old"


@pytest.fixture
def new_source(tmp_path):
    """The same places of upstream's main."""
    for file, text in {
        "data/transforms/transform.py": "def f(interp=Image.BILINEAR): ...",
        "evaluation/sem_seg_evaluation.py": "np.full(3, np.nan, dtype=float)",
        "export/__init__.py": "try: ...\nexcept ImportError: ...",
        "_C.cpython-311-x86_64-linux-gnu.so": "",
    }.items():
        path = tmp_path / "new" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "new"


def test_pillow(monkeypatch, old_source, new_source):
    monkeypatch.delattr(Image, "LINEAR", raising=False)
    assert not compat._patch_pillow(new_source) and not hasattr(Image, "LINEAR")
    assert compat._patch_pillow(old_source) and Image.LINEAR == Image.BILINEAR
    assert not compat._patch_pillow(old_source)  # done already


def test_numpy(monkeypatch, old_source, new_source):
    for name in ("float", "int", "object", "str"):
        if name in vars(np):
            monkeypatch.delattr(np, name)
    assert not compat._patch_numpy(new_source) and "float" not in vars(np)
    had_bool = np.bool if "bool" in vars(np) else None
    assert compat._patch_numpy(old_source)
    assert (np.float, np.int, np.object, np.str) == (float, int, object, str)
    assert had_bool is None or np.bool is had_bool  # NumPy 2's own stays
    assert not compat._patch_numpy(old_source)


def test_sampling_of_sets(old_source, new_source):
    from detectron2.data.common import MapDataset

    for source, drawn in ((old_source, "self._fallback_candidates"), (new_source, "candidates")):
        file = source / "data" / "common.py"
        file.write_text(f"self._rng.sample({drawn}, k=1)")
    init = MapDataset.__init__
    assert not compat._patch_sampling(new_source) and MapDataset.__init__ is init
    assert not compat._patch_sampling(old_source)  # done already
    dataset = MapDataset([1, None, 3], lambda x: x)
    assert {dataset[1] for _ in range(20)} == {1, 3}
    with pytest.raises(RuntimeError, match="dropped every image"):
        MapDataset([None], lambda x: x)[0]


def test_compiled_operators(monkeypatch, old_source, new_source):
    monkeypatch.setattr(compat, "_define_missing_torch_ops", lambda operator: None)
    for name in ("detectron2._C", "detectron2.evaluation.fast_eval_api"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert not compat._patch_compiled(new_source) and "detectron2._C" not in sys.modules
    assert compat._patch_compiled(old_source)
    stand_in = sys.modules["detectron2._C"]
    assert stand_in.get_compiler_version() == "not built" and not stand_in.has_cuda()
    assert not hasattr(stand_in, "__path__")
    with pytest.raises(RuntimeError, match="'deform_conv_forward' is missing.*pip install"):
        stand_in.deform_conv_forward(1, 2)
    fast_eval = sys.modules["detectron2.evaluation.fast_eval_api"].COCOeval_opt
    empty = COCO()
    empty.dataset = {"images": [], "annotations": [], "categories": []}
    empty.createIndex()
    evaluation = fast_eval(empty, empty, "bbox")
    assert {"evaluate", "accumulate", "summarize"} <= set(dir(evaluation))
    assert not compat._patch_compiled(old_source)


def test_caffe2(monkeypatch, old_source, new_source):
    monkeypatch.delitem(sys.modules, "detectron2.export.api", raising=False)
    assert not compat._patch_caffe2(new_source)
    assert compat._patch_caffe2(old_source)
    assert sys.modules["detectron2.export.api"].__all__ == []
    assert not compat._patch_caffe2(old_source)


def test_pkg_resources(monkeypatch, old_source):
    monkeypatch.delitem(sys.modules, "pkg_resources", raising=False)
    find_spec = compat.importlib.util.find_spec
    monkeypatch.setattr(
        compat.importlib.util, "find_spec", lambda n: None if n == "pkg_resources" else find_spec(n)
    )
    assert compat._patch_pkg_resources(old_source)
    file = sys.modules["pkg_resources"].resource_filename("mokd_det", "compat.py")
    assert file == compat.__file__
    monkeypatch.setitem(sys.modules, "pkg_resources", types.ModuleType("pkg_resources"))
    assert not compat._patch_pkg_resources(old_source)  # the real one stays


def test_a_second_call_changes_nothing():
    assert compat.apply() == []


def test_without_detectron2_nothing_happens(monkeypatch):
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    assert compat.apply() == []


def test_balancing_alone_needs_no_detectron2_and_patches_nothing():
    program = (
        "import json, sys\n"
        "import mokd_det, mokd_det.balancing\n"
        "print(json.dumps([n for n in sys.modules if n.startswith(('detectron2', 'mokd_det'))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout)
    assert "mokd_det.balancing" in loaded and "mokd_det.compat" not in loaded
    assert not [name for name in loaded if name.startswith("detectron2")]


def test_detectron2_imports_after_the_patches():
    """What 0.6 could not import before."""
    import detectron2.evaluation
    import detectron2.export
    import detectron2.model_zoo

    assert detectron2.export.TracingAdapter and detectron2.evaluation.COCOEvaluator
    assert detectron2.model_zoo.get_config_file


@pytest.mark.parametrize("name", ["box_iou", "nms"])
def test_rotated_boxes_work_or_say_how_to_get_them(name):
    boxes = torch.tensor([[5.0, 5.0, 4.0, 2.0, 0.0], [5.0, 5.0, 4.0, 2.0, 0.0]])

    def use():
        if name == "box_iou":
            return pairwise_iou_rotated(RotatedBoxes(boxes), RotatedBoxes(boxes))
        return batched_nms_rotated(boxes, torch.tensor([0.9, 0.8]), torch.zeros(2), 0.5)

    stand_in = (
        sys.modules["detectron2._C"].__file__
        if hasattr(sys.modules["detectron2._C"], "__file__")
        else None
    )
    if stand_in is None:
        with pytest.raises(RuntimeError, match="is missing.*docs/install.md"):
            use()
    else:
        expected = torch.ones(2, 2) if name == "box_iou" else torch.tensor([0])
        assert torch.allclose(use(), expected)


JIT = "`torch.jit.script` is deprecated. Please switch to `torch.compile` or `torch.export`."
GRID = "torch.meshgrid: in an upcoming release, it will be required to pass the indexing argument."


@pytest.mark.parametrize(
    "message, category, module, is_shown",
    [
        (JIT, FutureWarning, "torch.jit._script", False),
        (JIT, DeprecationWarning, "torch.jit._trace", False),
        (GRID, UserWarning, "torch.functional", False),
        ("pkg_resources is deprecated as an API.", UserWarning, "detectron2.model_zoo", False),
        (JIT, FutureWarning, "mokd_det.export", True),
        ("`torch.jit.script` is slow", FutureWarning, "torch.jit._script", True),
        ("`np.bool` is a deprecated alias", FutureWarning, "mokd_det.data.coco", True),
        ("torch.cross without a dim is deprecated", UserWarning, "torch.functional", True),
    ],
)
def test_warnings_that_only_libraries_can_mend_are_not_shown(message, category, module, is_shown):
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        compat.ignore_foreign_warnings()
        warnings.warn_explicit(message, category, "file.py", 1, module)
    assert bool(shown) == is_shown


def test_the_users_own_filters_come_first():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.ignore_foreign_warnings()
        with pytest.raises(FutureWarning):
            warnings.warn_explicit(JIT, FutureWarning, "file.py", 1, "torch.jit._script")


def test_our_own_code_calls_what_is_deprecated_in_one_place():
    """The filter goes by what is called, so it would hide other calls of ours."""
    files = (ROOT / "mokd_det").rglob("*.py")
    calls = [path for path in files if re.search(r"jit\.script\(|meshgrid\(", path.read_text())]
    assert calls == [ROOT / "mokd_det/export/torchscript.py"]  # the format that was asked for


@pytest.mark.slow
def test_commands_print_no_warnings_of_libraries(tmp_path, teacher_weights):
    """The start, anchors, and counting FLOPs, which traces: stderr has no warning at all."""
    opts = ["MODEL.WEIGHTS", teacher_weights, "OUTPUT_DIR", tmp_path, "MODEL.DEVICE", "cpu"]
    opts += ["MODEL.TORCHVISION.WEIGHTS", "", "DATALOADER.NUM_WORKERS", 0]
    args = ["--config-file", CONFIGS["teacher"], "--eval-only", "--zoo-row", *TREE_OPTS, *opts]
    done = run("tools/train_net.py", *args)
    assert not re.findall(r"\w*Warning:.*", done.stderr)


def test_torchs_remark_on_cuda_is_not_printed(caplog):
    logger = logging.getLogger("torch.utils.cpp_extension")
    compat.apply()
    with caplog.at_level(logging.WARNING, logger.name):
        logger.propagate = True
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr")
        logger.warning("Another one")
    assert [record.message for record in caplog.records] == ["Another one"]
