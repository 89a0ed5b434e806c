# Copyright (c) The mokd_det authors.
"""Names that come from files: they end up in paths, logs and tables."""

import unicodedata
from collections.abc import Iterable

# Of categories that are no characters to look at, two that Persian, Hindi and emoji need.
JOINERS = "\u200c\u200d"
# Of paths, of Windows' file names, and of HTML.
UNFIT = set('/\\:*?"<>|')


def _is_shown(character: str) -> bool:
    # Spaces of all widths ("Zs") are fine; line and paragraph separators are not.
    is_space = unicodedata.category(character) == "Zs"
    return character.isprintable() or is_space or character in JOINERS


def printable(text: str) -> str:
    """Return text with control characters, line ends and changes of direction as escapes."""
    return "".join(c if _is_shown(c) else c.encode("unicode_escape").decode() for c in text)


def is_class_name(name: object) -> bool:
    """Whether it is text that cannot forge a line of a log or table, by line ends or others."""
    return isinstance(name, str) and bool(name.strip()) and printable(name) == name


def check_class_names(names: Iterable[object], source: str) -> None:
    """
    Raise ValueError for a name that is none of :func:`is_class_name`. ``source``: where they come
    from, for the message.
    """
    for name in names:
        if not is_class_name(name):
            shown = f"'{printable(name)}'" if isinstance(name, str) else repr(name)
            raise ValueError(
                f"{source} has a class named {shown}: expected text without line ends and control "
                "characters. Rename it."
            )


def check_file_name(name: object, option: str) -> None:
    """Raise ValueError unless a name can be that of one file or folder inside another folder."""
    text = name if isinstance(name, str) else ""
    if not text.strip(". ") or len(text) > 200 or printable(text) != text or set(text) & UNFIT:
        raise ValueError(
            f"{option} is {name!r}: files are written under this name, so expected at most 200 "
            f"characters, none of {' '.join(sorted(UNFIT))}, and not only dots."
        )


def markdown_row(cells: Iterable[str]) -> str:
    """Return a line of a Markdown table; what is in a cell opens no other cell and no HTML."""
    shown = (printable(cell).replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(shown)} |"
