# Copyright (c) The mokd_det authors.
"""What a value of an option may be: building blocks of tables {option: bound}, and their check."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from detectron2.config import CfgNode

from ..untrusted import printable

INFINITY = math.inf


@dataclasses.dataclass(frozen=True)
class Bound:
    """
    Attributes:
        holds: whether a value is allowed; it may be of any type.
        expected: what is allowed, in words that follow "expected".
        hint: from a value that is not allowed to more words, such as the nearest names.
    """

    holds: Callable[[Any], bool]
    expected: str
    hint: Callable[[Any], str] = lambda value: ""

    def __or__(self, other: "Bound") -> "Bound":
        return Bound(
            lambda value: self.holds(value) or other.holds(value),
            f"{self.expected} or {other.expected}",
            lambda value: self.hint(value) or other.hint(value),
        )


# It stays one line, in whichever log or message it comes to be.
TEXT = Bound(
    lambda value: isinstance(value, str) and printable(value) == value,
    "a string without line ends and control characters",
)


def integer(low: float = -INFINITY, high: float = INFINITY) -> Bound:
    """An integer in [low, high]."""
    return Bound(
        lambda value: (
            isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        ),
        f"an integer{_range(low, high)}",
    )


def number(
    low: float = -INFINITY, high: float = INFINITY, *, above: bool = False, below: bool = False
) -> Bound:
    """A finite number from ``low`` to ``high``, both included unless ``above`` or ``below``."""

    def holds(value: Any) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        too_low = value <= low if above else value < low
        return math.isfinite(value) and not too_low and (value < high if below else value <= high)

    return Bound(holds, f"a finite number{_range(low, high, above, below)}")


def exactly(value: Any) -> Bound:
    """One value, such as None, -1 or ""."""
    return Bound(lambda other: type(other) is type(value) and other == value, repr(value))


def one_of(names: Iterable[str] | Callable[[], Iterable[str]], what: str = "") -> Bound:
    """
    One of some names, which are all listed.

    Args:
        names: or a function that returns them, for a registry that grows.
        what: they are, in words; the names are then listed by ``hint``, the nearest alone if there
            are any.
    """
    known = names if callable(names) else lambda: names

    def nearest(value: Any) -> str:
        close = difflib.get_close_matches(str(value), list(known()), n=3)
        return f"did you mean {' or '.join(map(repr, close))}?" if close else ""

    def hint(value: Any) -> str:
        listed = f"there are {', '.join(map(repr, sorted(known())))}" if what else ""
        return nearest(value) or listed

    words = what or f"one of {', '.join(map(repr, known()))}"
    return Bound(lambda value: isinstance(value, str) and value in known(), words, hint)


def rows(entry: Bound, length: int | None = None, least: int = 0) -> Bound:
    """A list of ``length`` entries, or of ``least`` or more."""

    def holds(value: Any) -> bool:
        if not isinstance(value, (list, tuple)) or not all(map(entry.holds, value)):
            return False
        return len(value) == length if length is not None else len(value) >= least

    count = f" of {length}" if length is not None else f" of {least} or more" if least else ""
    return Bound(
        holds,
        f"a list{count} with each entry {entry.expected}",
        lambda value: next((entry.hint(x) for x in _entries(value) if not entry.holds(x)), ""),
    )


def increasing(entry: Bound) -> Bound:
    """A list, each entry above the one before."""
    each = rows(entry)
    return Bound(
        lambda value: each.holds(value) and all(a < b for a, b in zip(value, value[1:])),
        f"an increasing list with each entry {entry.expected}",
    )


def interval(bound: Bound, words: str) -> Bound:
    """A list [low, high] with low <= high, each within ``bound``; ``words`` describe it."""
    pair = rows(bound, 2)
    return Bound(
        lambda value: pair.holds(value) and value[0] <= value[1], f"[low, high] with {words}"
    )


def check_bounds(
    cfg: CfgNode, table: Mapping[str, Bound], usual: CfgNode, sections: Iterable[str], source: str
) -> None:
    """
    Raise ValueError for the first option out of its bounds. One that the table does not have keeps
    the type of its default.

    Args:
        usual: the config with its defaults. Options that it does not have are a user's own.
        sections: those to check, such as "SOLVER".
        source: put before the message, to say whose config it is; "" for the user's own.
    """
    for section in sections:
        for key, value, default in leaves(cfg, usual, section):
            bound = table[key] if key in table else like(default)
            if not bound.holds(value):
                raise ValueError(f"{source}{refusal(key, value, bound)}")


def refusal(key: str, value: Any, bound: Bound) -> str:
    """Return the message for a value that a bound does not hold."""
    hint = bound.hint(value)
    if value is None:
        return f"{key} is null: expected {bound.expected}; leave it out for its default."
    return f"{key} is {value!r}: expected {bound.expected}{f' ({hint})' if hint else ''}."


def like(default: Any) -> Bound:
    """Return the bound of an option that has the type of its default, and no other."""
    if isinstance(default, bool):
        return Bound(lambda value: isinstance(value, bool), "True or False")
    if isinstance(default, int):
        return integer()
    if isinstance(default, float):
        return number()
    if isinstance(default, str):
        return TEXT
    if isinstance(default, (list, tuple)):
        return Bound(lambda value: isinstance(value, (list, tuple)), "a list")
    return Bound(lambda value: True, "a value")


def leaves(cfg: Any, usual: Any, key: str) -> Iterable[tuple[str, Any, Any]]:
    """Yield (full key, value, default) at and below an option."""
    name = key.rsplit(".", 1)[-1]
    if name not in cfg or name not in usual:
        return
    value, default = cfg[name], usual[name]
    if not isinstance(default, CfgNode):
        yield key, value, default
    elif not isinstance(value, CfgNode):
        raise ValueError(f"{key} is {value!r}: expected its options ({', '.join(default)}).")
    else:
        for part in default:
            yield from leaves(value, default, f"{key}.{part}")


def _entries(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _range(low: float, high: float, above: bool = False, below: bool = False) -> str:
    if low == -INFINITY and high == INFINITY:
        return ""
    if high == INFINITY:
        return f" {'>' if above else '>='} {low}"
    if low == -INFINITY:
        return f" {'<' if below else '<='} {high}"
    return f" in {'(' if above else '['}{low}, {high}{')' if below else ']'}"
