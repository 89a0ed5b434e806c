# Copyright (c) The mokd_det authors.
"""The site: pages that are made of code, links, and the strict build."""

import re

import build
import model_zoo
import options
import pytest

from mokd_det.config import get_cfg

from .conftest import ROOT

# Words of a page, generated ones aside.
BOUND = 2000


def test_every_option_is_on_the_page_of_options():
    """With its default, as the code says it."""
    found = {option.key: option for option in options.read(ROOT / build.DEFAULTS)}
    cfg = get_cfg()
    for key, option in found.items():
        node = cfg
        for part in key.split("."):
            node = node[part]
        if option.default:
            assert node == eval(option.default), key
    missing = {f"MOKD.{key}" for key in keys_of(cfg.MOKD)} - set(found)
    assert not missing
    page = options.page(ROOT / build.DEFAULTS)
    assert all(f"`{key.rpartition('.')[2]}`" in page for key, o in found.items() if o.default)


def keys_of(node, prefix=""):
    for key, value in node.items():
        yield prefix + key
        if hasattr(value, "items"):
            yield from keys_of(value, f"{prefix}{key}.")


@pytest.mark.parametrize(
    ("comment", "text"),
    [
        (["A line", "and MOKD.ENABLED."], "A line and `MOKD.ENABLED`."),
        (
            ["One of", '  "a"  this', "     and that", "Or None."],
            'One of<br>`"a"` this and that<br>Or None.',
        ),
        (["a | b < c"], "a \\| b &lt; c"),
    ],
)
def test_comments_become_prose(comment, text):
    assert re.sub(" +", " ", options.prose(comment)) == text


@pytest.mark.parametrize(
    ("link", "led"),
    [
        ("[a](balancing.md#x)", "[a](../balancing.md#x)"),
        ("[a](../../MODEL_ZOO.md)", "[a](../model_zoo.md)"),
        ("![a](../chart.svg)", "![a](../chart.svg)"),
        ("[the code](../../setup.cfg)", "the code (`setup.cfg`)"),
        ("[setup.cfg](../../setup.cfg)", "setup.cfg"),
        ("[a](https://x.org) [b](#c)", "[a](https://x.org) [b](#c)"),
        ("```\n[a](nowhere.md)\n```", "```\n[a](nowhere.md)\n```"),
    ],
)
def test_links_lead_to_pages(link, led):
    pages = build.all_pages()
    link = link.replace("(balancing", "(../balancing")
    assert build.relinked(link, "docs/tutorials/detector.md", pages) == led


def test_links_of_all_pages_lead_somewhere(tmp_path):
    """Those of README.md, too, which is no page."""
    build.assemble(tmp_path / "docs")
    build.relinked(
        (ROOT / "README.md").read_text(), "README.md", {**build.all_pages(), "README.md": "x"}
    )
    with pytest.raises(FileNotFoundError, match="docs/a.md links to 'nowhere.md', which does not"):
        build.relinked("[a](nowhere.md)", "docs/a.md", {"docs/a.md": "a.md"})


def test_pages_are_short():
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    long = {p.name: len(p.read_text().split()) for p in pages if p.name not in GENERATED}
    assert {name: words for name, words in long.items() if words > BOUND} == {}


GENERATED = ("MODEL_ZOO.md", "CHANGELOG.md")


def test_chart_is_what_the_records_say():
    chart = (ROOT / "docs/chart.svg").read_text()
    for row, methods in model_zoo.gains().items():
        assert all(f">{line}</text>" in chart for line in row.split("\n")), (
            "run studies/model_zoo.py"
        )
        for *_, label in methods.values():
            assert f">{label}</text>" in chart, "run studies/model_zoo.py"


def test_results_of_the_readme_are_what_the_records_say():
    readme = (ROOT / "README.md").read_text()
    missing = [
        row for row in map(" | ".join, model_zoo.readme_rows()) if f"| {row} |" not in readme
    ]
    assert not missing


@pytest.mark.slow
def test_site_builds_strictly():
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    build.assemble(build.SOURCE)
    assert build.generate() == 0
    site = ROOT / "build/docs"
    assert "REPEATED_AUGMENTATION" in (site / "configuration.html").read_text()
    assert "mokd_det.balancing.Rule" in (site / "api.html").read_text()
    index = build.SOURCE / "index.md"
    index.write_text(f"{index.read_text()}\n[a heading that is not there](balancing.md#nowhere)\n")
    assert build.generate() != 0
