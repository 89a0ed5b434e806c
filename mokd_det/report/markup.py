# Copyright (c) The mokd_det authors.
"""The parts of a page, as HTML. Whatever comes from files is escaped here."""

import base64
import html
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from .predictions import Box, Picture
from .tables import Table

LARGEST = 420  # pixels of a picture's longer side
SMALL = 100
TEXT: Callable[[Any], str] = lambda value: html.escape(str(value))  # noqa: E731
Sides = Sequence[tuple[str, str]]
"""Label and colour of each run that is shown."""

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #f5f6f8; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 8px 24px 64px; }
h1 { font-size: 26px; margin: 24px 0 4px; }
h2 { font-size: 19px; margin: 0 0 12px; }
h3 { font-size: 15px; margin: 20px 0 6px; }
section { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 18px 22px;
          margin: 18px 0; }
nav a { margin-right: 16px; color: #0b5cad; text-decoration: none; }
.scroll { overflow-x: auto; }
.scroll svg { max-width: 100%; height: auto; min-width: 640px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; border-bottom: 1px solid #e7eaee; text-align: left;
         vertical-align: top; }
th { color: #5a6675; font-weight: 600; font-size: 13px; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.option { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere;
            min-width: 130px; }
td.best { font-weight: 700; }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
.note { color: #5a6675; font-size: 14px; margin: 8px 0; }
.gain { font-size: 17px; margin: 4px 0; }
.row { display: flex; flex-wrap: wrap; gap: 12px; margin: 4px 0 22px; }
figure { margin: 0; width: 265px; }
figure svg, figure .none { width: 100%; height: auto; border-radius: 4px; display: block;
                           background: #e9ecf0; }
figure .none { box-sizing: border-box; padding: 24px 12px; color: #5a6675; font-size: 13px;
               overflow-wrap: anywhere; }
.small { width: 150px; }
.small image { image-rendering: pixelated; }
figcaption { font-size: 13px; margin-top: 4px; }
.right { color: #00795a; } .wrong { color: #b8410b; }
"""
# Of the boxes: in the ground truth, found rightly, found wrongly.
TRUTH, RIGHT, WRONG = "#ffd54a", "#2ee6a8", "#ff6a3d"


def note(text: str) -> str:
    """Return a paragraph of plain text."""
    return f'<p class="note">{TEXT(text)}</p>'


def dot(colour: str) -> str:
    """Return the mark of a run's colour."""
    return f'<span class="dot" style="background:{colour}"></span>'


def table_of(table: Table, kind: str = "") -> str:
    """Return a table; ``kind`` is the class of its cells that are no numbers."""
    numbers = [
        any(isinstance(row[i], (int, float)) for row in table.rows) for i in range(len(table.head))
    ]
    classes = ["number" if is_number else kind for is_number in numbers]
    head = "".join(f'<th class="{c}">{TEXT(t)}</th>' for c, t in zip(classes, table.head))
    rows = []
    for row in table.rows:
        cells = []
        for i, (value, name) in enumerate(zip(row, classes)):
            is_best = table.best and isinstance(value, float) and value == table.best[i]
            is_best = is_best and row[1] != "teacher"
            cells.append(
                f'<td class="{name}{" best" if is_best else ""}">{_cell(value, table.form)}</td>'
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return format(value, form) if isinstance(value, float) else TEXT(value)


def picture_rows(
    key: str, sides: Sides, shown: Sequence[Picture], reason: str, score: float
) -> Iterator[str]:
    """Yield what :func:`mokd_det.report.predictions.pictures` has shown, ``key`` in its ids."""
    if reason:
        yield note(reason)
    elif isinstance(shown[0].truth, list):
        yield note(
            "First where most boxes are not in all runs. Yellow: ground truth; green: found; "
            f"orange: found where nothing is. Score {score:g} or more."
        )
    else:
        yield note("First where the runs differ most in the probability of the right class.")
    cells = [
        (_detected if isinstance(picture.truth, list) else _classified)(
            picture, sides, f"image-{key}-{number}"
        )
        for number, picture in enumerate(shown)
    ]
    is_detection = shown and isinstance(shown[0].truth, list)
    yield from cells if is_detection else [f'<div class="row">{"".join(cells)}</div>']


def _detected(picture: Picture, sides: Sides, identifier: str) -> str:
    """An image with the ground truth, and again with what each run says."""
    caption = f"<b>ground truth</b>: {len(picture.truth)}"
    cells = [_figure(picture, identifier, _boxes(picture.truth, TRUTH), caption, True)]
    for (label, colour), boxes in zip(sides, picture.said):
        right = [box for box in boxes if box.right]
        wrong = [box for box in boxes if not box.right]
        caption = (
            f"{dot(colour)}<b>{TEXT(label)}</b>: {len(right)} found, "
            f"{len(picture.truth) - len(right)} missed, {len(wrong)} wrong"
        )
        drawn = _boxes(right, RIGHT) + _boxes(wrong, WRONG)
        cells.append(_figure(picture, identifier, drawn, caption))
    name = f'<div class="note">{TEXT(picture.name)}</div>'
    return f'{name}<div class="row">{"".join(cells)}</div>'


def _classified(picture: Picture, sides: Sides, identifier: str) -> str:
    """An image, and below it what each run says."""
    lines = [f"<b>{TEXT(picture.truth)}</b>"]
    for (label, colour), (name, share) in zip(sides, picture.said):
        mark = "right" if name == picture.truth else "wrong"
        lines.append(
            f'{dot(colour)}{TEXT(label)}: <span class="{mark}">{TEXT(name)}</span> {share:.2f}'
        )
    return _figure(picture, identifier, "", "<br>".join(lines), True)


def _figure(
    picture: Picture, identifier: str, drawn: str, caption: str, is_first: bool = False
) -> str:
    kind = ' class="small"' if max(picture.size) <= SMALL else ""
    if picture.image is None:
        shown = f'<div class="none">{TEXT(picture.name)}: {TEXT(picture.problem)}.</div>'
        return f"<figure{kind}>{shown}<figcaption>{caption}</figcaption></figure>"
    width, height = picture.size
    if is_first:  # the others refer to it, so its pixels are in the page once
        image = (
            f'<image id="{identifier}" width="{width}" height="{height}" '
            f'href="data:image/jpeg;base64,{_jpeg(picture.image)}"/>'
        )
    else:
        image = f'<use href="#{identifier}"/>'
    return (
        f'<figure{kind}><svg viewBox="0 0 {width} {height}">{image}{drawn}</svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _boxes(boxes: Sequence[Box], colour: str) -> str:
    return "".join(
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="none" '
        f'stroke="{colour}" stroke-width="2" vector-effect="non-scaling-stroke">'
        f"<title>{TEXT(box.category)} {box.score:.2f}</title></rect>"
        for box in boxes
        for x, y, w, h in [box.xywh]
    )


def _jpeg(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((LARGEST, LARGEST))
    image.save(content := io.BytesIO(), "JPEG", quality=85)
    return base64.b64encode(content.getvalue()).decode()
