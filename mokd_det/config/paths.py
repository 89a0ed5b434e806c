# Copyright (c) The mokd_det authors.
"""Where the files are that a config names: beside it, in the package, or where one stands."""

import os
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

SHIPPED = "mokd://"  # the configs that come with mokd_det
FILES = (
    "DATASETS.CLASSIFICATION",
    "DATASETS.COCO",
    "DATASETS.PROPOSAL_FILES_TEST",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "MODEL.CLASSIFIER.WEIGHTS",
    "MODEL.LAZY_CONFIG.FILE",
    "MODEL.TORCHVISION.WEIGHTS",
    "MODEL.TORCHVISION_DETECTOR.WEIGHTS",
    "MODEL.WEIGHTS",
    "MOKD.TEACHER.CONFIG_FILE",
    "MOKD.TEACHER.TORCHSCRIPT.FILE",
    "MOKD.TEACHER.WEIGHTS",
)
NAMED = ("DATASETS.CLASSIFICATION", "DATASETS.COCO")  # each entry begins with a name


def shipped_config(name: str) -> str | None:
    """
    Return the file of a config that comes with mokd_det, by its name, also after "configs/" or
    "mokd://"; None: there is none.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "configs", package.parent / "configs"):  # a wheel's; a checkout's
        file = folder / name.removeprefix(SHIPPED).removeprefix("configs/")
        if file.is_file():
            return str(file)
    return None


def config_path(name: str) -> str:
    """Return the file of a config: ``name`` itself if it is there, else that of mokd_det's."""
    is_shipped = name.startswith(SHIPPED)
    if not is_shipped and ("://" in name or PathManager.isfile(name)):
        return name
    return shipped_config(name) or name


class LocatedConfig(CfgNode):
    """
    Reads config files. What lies beside a file is found from any folder, also if it is a base of
    another; and ``_BASE_: "mokd://..."`` is a config that comes with mokd_det.
    """

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        # A base is joined to the folder of the file that names it.
        if SHIPPED in filename:
            name = filename.rpartition(SHIPPED)[2]
            if (shipped := shipped_config(name)) is None:
                raise FileNotFoundError(f"'{SHIPPED}{name}' is no config of mokd_det")
            filename = shipped
        loaded = super().load_yaml_with_base(filename, allow_unsafe)
        if isinstance(loaded, dict) and os.path.isfile(filename):
            for key in FILES:
                _locate(loaded, key, os.path.dirname(filename))
        return loaded


def _locate(loaded: dict[str, Any], key: str, folder: str) -> None:
    """Write the path of what lies in ``folder`` in place of its name; other values stay."""
    *nodes, last = key.split(".")
    node: Any = loaded
    for name in nodes:
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        return
    value = node[last]
    if key in NAMED and isinstance(value, list):
        entries = [x for x in value if isinstance(x, list)]
        for entry in entries:
            entry[1:] = [_beside(path, folder) for path in entry[1:]]
    elif isinstance(value, list):
        node[last] = [_beside(path, folder) for path in value]
    else:
        node[last] = _beside(value, folder)


def _beside(path: Any, folder: str) -> Any:
    if not isinstance(path, str) or not path or "://" in path:
        return path
    found = os.path.join(folder, path)  # an absolute path stays
    if not os.path.exists(found) or (os.path.exists(path) and os.path.samefile(path, found)):
        return path
    return os.path.abspath(found)
