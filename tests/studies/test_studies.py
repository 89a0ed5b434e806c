# Copyright (c) The mokd_det authors.
"""The studies of the repository, and MODEL_ZOO.md."""

import json
import shlex

import model_zoo
import pytest
import records
import run

from mokd_det.config import get_cfg, load_config
from mokd_det.config.bounds import check_bounds
from mokd_det.engine.bounds import BOUNDS
from mokd_det.engine.combinations import OF_DISTILLATION, OF_MODELS, OF_TRAINING, check_combinations
from mokd_det.engine.validate import SECTIONS, _check_kind, _check_objectives, _check_read
from mokd_det.modeling import check_balancing
from mokd_det.tasks import task_of

from ..conftest import ROOT

STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


def test_studies_are_few_and_small():
    files = {path.name for path in (ROOT / "studies").iterdir() if path.is_file()}
    scripts = {"run.py", "records.py", "plots.py", "model_zoo.py"}
    names = {path.stem for path in STUDIES}
    assert len(names) <= 12
    assert {name.split(".")[0] for name in files - scripts} == names
    size = sum(path.stat().st_size for path in (ROOT / "studies").glob("*.json"))
    assert size < 1_500_000


def test_the_help_names_methods_that_exist():
    examples = [shlex.split(line) for line in run.__doc__.splitlines() if "--only" in line]
    assert examples
    for example in examples:
        study = records.load_study(ROOT / next(word for word in example if word.endswith(".yaml")))
        asked = [method for flag, method in zip(example, example[1:]) if flag == "--only"]
        assert asked and set(asked) <= set(study["methods"])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_records_are_of_the_studies_methods(path):
    study = records.load_study(path)
    content = records.read_file(study["records"])
    planned = set(records.runs_of(study))
    for record in content["runs"]:
        assert (record["method"], record["seed"]) in planned
        assert record["config"] == study["methods"][record["method"]]["config"]
        assert record["opts"][-2:] == ["SEED", record["seed"]]
        assert ("balance" in record) <= (record["method"] in study["balance"])
    assert {teacher["config"] for teacher in content["teachers"]} <= set(study["teacher"])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_can_be_run_with_todays_options(path):
    """With what needs no data and no teacher: no option is unknown, and somebody reads each."""
    study = records.load_study(path)
    for method in study["methods"].values():
        opts = [str(opt) for opt in (*study["opts"], *method.get("opts", []))]
        cfg = load_config(str(ROOT / method["config"]), opts)
        task = task_of(cfg)
        check_bounds(cfg, BOUNDS, get_cfg(), [*SECTIONS, "SOLVER"], "")
        check_combinations(cfg, [OF_MODELS, OF_TRAINING])
        _check_kind(cfg, task)
        if cfg.MOKD.ENABLED:
            _check_objectives(cfg, task)
            _check_read(cfg, task)
            check_combinations(cfg, [OF_DISTILLATION])
            check_balancing(cfg, task)


def test_model_zoo_is_what_the_records_say():
    text = (ROOT / "MODEL_ZOO.md").read_text()
    assert text == model_zoo.model_zoo(), "run studies/model_zoo.py"
    assert len(text.splitlines()) <= 165
    assert all(line.count("|") <= 8 for line in text.splitlines())  # seven columns


def test_model_zoo_leaves_no_row_out():
    shown = {}
    for _, groups, _ in model_zoo.TABLES:
        for _, name, methods in groups:
            study, summary = model_zoo.load(name)
            shown.setdefault(name, set()).update(methods or summary)
    for studies in model_zoo.MAIN.values():
        for name, _, *methods in studies:
            study, _ = model_zoo.load(name)
            shown.setdefault(name, set()).update({*methods, *study["baseline"][:2]})
    for path in STUDIES:
        study = records.load_study(path)
        assert set(records.read_records(study)) <= shown.get(study["name"], set())


def test_links_of_model_zoo_lead_to_files():
    text = (ROOT / "MODEL_ZOO.md").read_text()
    targets = {part.split(")")[0] for part in text.split("](")[1:]}
    assert targets and all((ROOT / target).is_file() for target in targets)


@pytest.mark.parametrize("script", [run, model_zoo], ids=["run", "model_zoo"])
def test_every_script_has_help_with_an_example(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--help"])
    with pytest.raises(SystemExit):
        script.main()
    assert f"python studies/{script.__name__}.py" in capsys.readouterr().out


def test_records_are_json_without_nan():
    def refuse(name):
        raise ValueError(name)

    for path in (ROOT / "studies").glob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)
