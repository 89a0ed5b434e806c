# Copyright (c) The mokd_det authors.
"""The page of all options, from the comments of mokd_det/config/defaults.py (nothing is run)."""

import ast
import html
import re
from pathlib import Path
from typing import NamedTuple

HEAD = """# Configuration

Every option that mokd_det adds to [Detectron2's](https://detectron2.readthedocs.io/en/latest/modules/config.html). The page is made from the comments of `mokd_det/config/defaults.py`. A misspelt key, a value out of bounds and an option that nothing reads are errors before training.
"""  # noqa: E501


class Option(NamedTuple):
    """
    Attributes:
        key (str): such as "MOKD.ENABLED".
        default (str): as it stands in the code; "" of a node, which holds further options.
        comment (list[str]): lines above it.
    """

    key: str
    default: str
    comment: list


def read(path: Path) -> list[Option]:
    """Return the assignments ``cfg.KEY = default`` of the file, in their order."""
    text = path.read_text()
    lines = text.splitlines()
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        key = ast.unparse(node.targets[0])
        if key.startswith("cfg."):
            default = ast.get_source_segment(text, node.value)
            default = {"CN()": "", "CN(new_allowed=True)": "{}"}.get(default, default)
            comment = comment_above(lines, node.lineno)
            found.append(Option(key.removeprefix("cfg."), default, comment))
    return found


def comment_above(lines: list[str], number: int) -> list[str]:
    """Return the comment that ends above a line (counted from 1), without its marks."""
    comment = []
    for line in reversed(lines[: number - 1]):
        text = line.strip()
        if not text.startswith("#") or re.fullmatch(r"# -+ #", text):
            break
        comment.insert(0, text[1:].removeprefix(" "))
    return comment


def prose(comment: list[str]) -> str:
    """Return a comment as one line of Markdown; indented lines are items, values and keys code."""
    items, is_item = [""], False
    for line in comment:
        starts = bool(re.match(r" {2}\S", line))  # further lines of an item are indented by more
        ends = is_item and not line.startswith(" ")
        is_item = starts or (is_item and not ends)
        items += [""] if starts or ends else []
        items[-1] += f" {line.strip()}"
    text = "<br>".join(html.escape(item.strip(), quote=False) for item in items)
    text = re.sub(r'"[^"]*"|\b[A-Z][A-Z_]+(?:\.[A-Z_*]+)+', lambda match: f"`{match[0]}`", text)
    return text.replace("|", "\\|")


def page(path: Path) -> str:
    """Return the Markdown of all options: a section for each node, a row for each comment."""
    options = read(path)
    nodes = {option.key: option for option in options if not option.default}
    sections: dict[str, list[list]] = {}
    for option in options:
        if not option.default:
            sections.setdefault(option.key, [])
            continue
        rows = sections.setdefault(option.key.rpartition(".")[0], [])
        if option.comment or not rows:
            rows.append([[option], prose(option.comment)])
        else:  # it shares the comment of the one above
            rows[-1][0].append(option)
    text = HEAD
    for node, rows in sorted(sections.items(), key=lambda item: (item[0][:4] != "MOKD", item[0])):
        text += f"\n## {node}\n"
        if node in nodes and nodes[node].comment:
            text += f"\n{prose(nodes[node].comment)}\n"
        if rows:
            text += "\n| key | default | |\n| --- | --- | --- |\n"
        for shared, comment in rows:
            names = "<br>".join(f"`{option.key.rpartition('.')[2]}`" for option in shared)
            defaults = "<br>".join(f"`{option.default}`" for option in shared)
            text += f"| {names} | {defaults} | {comment} |\n"
    return text
