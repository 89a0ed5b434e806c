# Copyright (c) The mokd_det authors.
"""A registry whose error helps. It needs nothing but Python, as `balancing` needs only torch."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """
    Return a sentence with the few known names that a wrong one may stand for: those that it is a
    part of, or else those nearest to it. Each is shown after ``prefix``.
    """
    known, name = list(known), name.lower()
    parts = [other for other in known if len(name) > 2 and name in other.lower()]
    close = parts[:3] or difflib.get_close_matches(name, known)
    shown = [f"'{prefix}{other}'" for other in close]
    return f"Did you mean {' or '.join(shown)}?" if close else "No name is like it."


class Registry:
    """Objects by name, as Detectron2's registries."""

    def __init__(self, name: str, option: str, others: str = ""):
        """For messages: ``option`` is the key that selects from it, and may have ``others``."""
        self.name, self.option, self.others = name, option, others
        self._objects: dict[str, Any] = {}

    def register(self, name: str) -> Callable:
        """Return a decorator that registers a class or function, and calls it ``name``."""

        def decorator(obj: Any) -> Any:
            if same := [known for known in self if known.lower() == name.lower()]:
                raise KeyError(f"{self.name} has an object named '{same[0]}' already.")
            self._objects[name] = obj
            obj.name = name
            return obj

        return decorator

    def get(self, name: str) -> Any:
        """Return the object called ``name``; ValueError with the known names if there is none."""
        if name not in self._objects:
            raise ValueError(
                f"{self.option} is '{name}', which is not in {self.name}: expected one of "
                f"{', '.join(map(repr, self))}{self.others}. One of your own: import its module "
                "first (--import)."
            )
        return self._objects[name]

    def remove(self, name: str) -> None:
        """Take an object out again: for tests."""
        del self._objects[name]

    def __contains__(self, name: str) -> bool:
        return name in self._objects

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._objects))
