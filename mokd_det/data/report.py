# Copyright (c) The mokd_det authors.
"""What a check of a data set found: errors, with which training would be wrong, and warnings."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from ..untrusted import printable


@dataclasses.dataclass
class Report:
    """A message for each kind of mistake, which counts the cases and names the first ones."""

    errors: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def error(self, message: str, cases: Iterable[Any] = ()) -> None:
        """Add an error, with :func:`listed` cases behind it if there are any."""
        self.errors.append(_with_cases(message, cases))

    def warn(self, message: str, cases: Iterable[Any] = ()) -> None:
        """Add a warning, with :func:`listed` cases behind it if there are any."""
        self.warnings.append(_with_cases(message, cases))

    def raise_for_errors(self, what: str) -> None:
        """Raise one ValueError with all errors of ``what``, the data set, if there are any."""
        if len(self.errors) == 1:
            raise ValueError(f"{what}: {self.errors[0]}")
        if self.errors:
            lines = "".join(f"\n  {error}" for error in self.errors)
            raise ValueError(f"{what} has {len(self.errors)} kinds of errors:{lines}")


def listed(cases: Iterable[Any], most: int = 3) -> str:
    """Return the number of cases and the first ones, as "12: a, b, c, ..."."""
    cases = list(cases)
    rest = ", ..." if len(cases) > most else ""
    return f"{len(cases)}: {', '.join(printable(str(case)) for case in cases[:most])}{rest}"


def _with_cases(message: str, cases: Iterable[Any]) -> str:
    cases = list(cases)
    return f"{message} ({listed(cases)})" if cases else message
