# Copyright (c) The mokd_det authors.
"""Counts what was tried and what held, and prints it at the end (also under xdist)."""

import pytest

LINES = {
    "kill": "kills survived",
    "kill in a write": "  of them during a write",
    "stop": "stops by a signal, saved and within their time",
    "resume": "bit-identical resumes",
    "corruption": "corrupted files detected",
    "full disk": "full disks with one sentence and a whole checkpoint",
}


@pytest.fixture
def count(request):
    """From (a key of LINES, whether it held) to an assertion of that, which is counted."""

    def count(kind, held, message=""):
        request.node.user_properties.append((kind, bool(held)))
        assert held, message or kind

    return count


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "reliability":
            item.add_marker(pytest.mark.reliability)


def pytest_terminal_summary(terminalreporter):
    found = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for kind, held in report.user_properties:
                    if kind in LINES:
                        found.setdefault(kind, []).append(held)
    if found:
        terminalreporter.section("reliability")
    for kind, line in LINES.items():
        if kind in found:
            terminalreporter.line(f"{line}: {sum(found[kind])} / {len(found[kind])}")
