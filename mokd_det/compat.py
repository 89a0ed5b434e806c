# Copyright (c) The mokd_det authors.
"""
What Detectron2 0.6 needs to run on today's NumPy, Pillow, setuptools and PyTorch; and that no
Detectron2 runs the code that pickled weights or proposals may hold. Nothing else.

Importing this module applies the patches, before the first import of a Detectron2 submodule: all
folders of mokd_det that use Detectron2 import it first. Every patch looks whether it is needed, so
a build of upstream's main branch (which needs at most the last three) is left as it is.
"""

import importlib
import importlib.util
import logging
import random
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

BUILD_HINT = (
    "this Detectron2 has no compiled operators (the packaged 0.6 comes without them). "
    "Build upstream's, see docs/install.md: "
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)


def apply() -> list[str]:
    """
    Apply every patch that the installed Detectron2 needs, and return the names of those applied
    now: none without Detectron2 and on a second call.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(spec.submodule_search_locations[0])
    patches = {
        "pillow": _patch_pillow,
        "numpy": _patch_numpy,
        "compiled": _patch_compiled,
        "caffe2": _patch_caffe2,
        "pkg_resources": _patch_pkg_resources,
        # The last two import Detectron2.
        "sampling": _patch_sampling,
        "pickle": _patch_pickle,
    }
    with warnings.catch_warnings():
        ignore_foreign_warnings(append=False)  # also where warnings are to be errors
        applied = [name for name, patch in patches.items() if patch(root)]
        importlib.import_module("detectron2.modeling")
    ignore_foreign_warnings()
    logging.getLogger("torch.utils.cpp_extension").addFilter(_says_more_than_no_gpu)
    return applied


# What libraries say of each other: nobody who uses mokd_det can fix it. The message, of whom it
# is (what the library calls, as torch counts it), and the category.
FOREIGN_WARNINGS = (
    # Detectron2 and fvcore script functions when they are imported, torchvision when it is traced.
    (r"`torch\.jit\.\w+` is (deprecated|not supported)", r"torch\.jit\.", Warning),
    # Detectron2's anchors.
    (r"torch\.meshgrid: in an upcoming release", r"torch\.functional", UserWarning),
    # Detectron2's model zoo.
    (r"pkg_resources is deprecated", r"detectron2\.model_zoo", Warning),
)


def ignore_foreign_warnings(append: bool = True) -> None:
    """Ignore ``FOREIGN_WARNINGS``; ``append``: unless the user's own filters say otherwise."""
    for message, module, category in FOREIGN_WARNINGS:
        warnings.filterwarnings("ignore", message, category, module, append=append)


def _says_more_than_no_gpu(record: logging.LogRecord) -> bool:
    """Torch says so at every start where CUDA's compiler is installed, but no GPU."""
    return not record.getMessage().startswith("No CUDA runtime is found")


def _mentions(file: Path, text: str) -> bool:
    # 0.6 and main both call themselves 0.6, so the source is the only witness of which one it is.
    return file.is_file() and text in file.read_text(encoding="utf-8")


def _patch_pillow(root: Path) -> bool:
    """Pillow 10 removed ``Image.LINEAR``; 0.6 uses it as a default argument."""
    from PIL import Image

    source = root / "data" / "transforms" / "transform.py"
    if hasattr(Image, "LINEAR") or not _mentions(source, "Image.LINEAR"):
        return False
    vars(Image)["LINEAR"] = Image.Resampling.BILINEAR.value
    return True


def _patch_numpy(root: Path) -> bool:
    """NumPy 1.24 removed its aliases of Python's own types (NumPy 2 brought ``bool`` back)."""
    import numpy as np

    aliases = {"bool": bool, "float": float, "int": int, "object": object, "str": str}
    missing = {name: alias for name, alias in aliases.items() if name not in vars(np)}
    if not missing or not _mentions(root / "evaluation" / "sem_seg_evaluation.py", "np.float)"):
        return False
    for name, alias in missing.items():
        setattr(np, name, alias)
    return True


def _patch_compiled(root: Path) -> bool:
    """
    Without ``detectron2._C`` nothing imports. Detectors that need none of its operators run with
    this stand-in; the others fail at the operator, with the way to get it.
    """
    if "detectron2._C" in sys.modules or any(root.glob("_C*.so")) or any(root.glob("_C*.pyd")):
        return False

    compiled: Any = types.ModuleType("detectron2._C", doc="Stand-in for absent compiled operators.")
    # detectron2.utils.collect_env asks these of any _C that imports.
    compiled.get_compiler_version = lambda: "not built"
    compiled.get_cuda_version = lambda: "not built"
    compiled.has_cuda = lambda: False

    def missing_operator(name: str) -> Callable:
        # Import machinery and inspection look for dunders and take AttributeError for an answer.
        if name.startswith("__"):
            raise AttributeError(name)

        def operator(*args, **kwargs):
            raise RuntimeError(f"Detectron2's operator '{name}' is missing: {BUILD_HINT}.")

        return operator

    compiled.__getattr__ = missing_operator
    sys.modules["detectron2._C"] = compiled
    # The definitions live as long as this object.
    compiled.library = _define_missing_torch_ops(missing_operator)

    # 0.6 imports its C++ COCO evaluation unconditionally; others give the same numbers.
    fast_eval: Any = types.ModuleType("detectron2.evaluation.fast_eval_api")

    def coco_eval(*args, **kwargs):
        # Imported late: that package needs the one which is being imported here.
        from .evaluation.fast_coco import fast_coco_eval

        return fast_coco_eval(*args, **kwargs)

    fast_eval.COCOeval_opt = coco_eval
    sys.modules["detectron2.evaluation.fast_eval_api"] = fast_eval
    return True


def _define_missing_torch_ops(missing_operator: Callable[[str], Callable]) -> Any:
    """Return the library of what Detectron2 calls ``torch.ops.detectron2.*`` (0.6: the first)."""
    import torch

    library = torch.library.Library("detectron2", "FRAGMENT")
    for schema in (
        "nms_rotated(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor",
        "roi_align_rotated_forward(Tensor input, Tensor rois, float spatial_scale, "
        "SymInt pooled_height, SymInt pooled_width, SymInt sampling_ratio) -> Tensor",
    ):
        library.define(schema)
        name = schema.split("(")[0]
        library.impl(name, missing_operator(name), "CompositeExplicitAutograd")
    return library


def _patch_caffe2(root: Path) -> bool:
    """``detectron2.export`` of 0.6 imports ``.api``, all caffe2, which left PyTorch about 2.0."""
    name, package = "detectron2.export.api", root / "export" / "__init__.py"
    needless = name in sys.modules or importlib.util.find_spec("caffe2") is not None
    if needless or _mentions(package, "except ImportError"):
        return False
    api: Any = types.ModuleType(name, doc="Stand-in: Detectron2's caffe2 export needs caffe2.")
    api.__all__ = []
    sys.modules[name] = api
    return True


def _patch_pkg_resources(root: Path) -> bool:
    """setuptools 82 dropped pkg_resources; ``detectron2.model_zoo`` needs one function of it."""
    if "pkg_resources" in sys.modules or importlib.util.find_spec("pkg_resources") is not None:
        return False
    stand_in: Any = types.ModuleType("pkg_resources", doc="Stand-in with resource_filename only.")

    def resource_filename(package: str, resource: str) -> str:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations, package
        return str(Path(spec.submodule_search_locations[0]) / resource)

    stand_in.resource_filename = resource_filename
    sys.modules["pkg_resources"] = stand_in
    return True


def _patch_sampling(root: Path) -> bool:
    """
    Python 3.11 samples no sets; ``MapDataset`` of 0.6 does, after a mapper has dropped an image.
    Every ``MapDataset`` fails without its reason once the mapper has dropped all of them.
    """
    common: Any = importlib.import_module("detectron2.data.common")
    if common.MapDataset.__init__.__module__ == __name__:
        return False

    class Sampling(random.Random):
        def sample(self, population, k, **kwargs):
            if not population:
                raise RuntimeError("The mapper dropped every image: check the data set.")
            if isinstance(population, set) and sys.version_info >= (3, 11):
                population = sorted(population)
            return super().sample(population, k, **kwargs)

    init = common.MapDataset.__init__

    def patched(self: Any, dataset: Any, map_func: Callable) -> None:
        init(self, dataset, map_func)
        self._rng = Sampling(42)

    common.MapDataset.__init__ = patched
    return True


def _patch_pickle(root: Path) -> bool:
    """Detectron2 reads .pkl weights and proposals by ``pickle.load``, which runs what they say."""

    def load(file: Any, encoding: str = "ASCII") -> Any:
        # Imported late: this module loads nothing else of mokd_det.
        from .untrusted import read_pickle

        return read_pickle(file, encoding)

    names = ("detectron2.checkpoint.detection_checkpoint", "detectron2.data.build")
    modules: list[Any] = [importlib.import_module(name) for name in names]
    stock = [module for module in modules if isinstance(module.pickle, types.ModuleType)]
    for module in stock:
        module.pickle = types.SimpleNamespace(load=load)
    return bool(stock)


APPLIED = apply()
"""Names of the patches that were needed."""
