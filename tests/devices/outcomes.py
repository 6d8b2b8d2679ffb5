"""A plugin that writes each outcome as it comes, leaves out what passed before, and stops in time.

Used as `pytest -p tests.devices.outcomes --outcomes FILE --until SECONDS`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest


def read(file: Path) -> dict[str, dict[str, object]]:
    """The last outcome of each test."""
    lines = file.read_text().splitlines() if file.exists() else []
    found = {}
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            # The last one, where a run was killed.
            continue
        found[row["test"]] = row
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True, help="append each outcome to this file")
    parser.addoption("--until", type=float, default=float("inf"), help="stop at this time, in seconds of the epoch")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    before = read(config.getoption("--outcomes"))
    done = {test for test, row in before.items() if row["outcome"] == "passed"}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


class Writer:
    """Writes outcomes, in the process that gathers them."""

    def __init__(self, config: pytest.Config) -> None:
        self.file, self.until = config.getoption("--outcomes"), config.getoption("--until")
        self.session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed):
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            if report.failed:
                row["error"] = report.longreprtext[-2000:]
            self.write(row)
        if time.time() > self.until:
            self.session.shouldstop = "the time is up"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write({"test": report.nodeid, "outcome": "failed", "error": str(report.longrepr)[-2000:]})

    def write(self, row: dict[str, object]) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    # Workers report to the process that started them.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(config))
