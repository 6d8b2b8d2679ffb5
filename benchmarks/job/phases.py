"""Phases: where the time of a job goes, and how much memory each part of it takes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

from benchmarks.optimizer.memory import resident
from torch_simu.optimizer import GradientBalance, SIMUOptimizer
from torch_simu.unlearning import driver, steps
from torch_simu.unlearning.refresh import Refresh

Result = TypeVar("Result")
NAMES = ("load", "attribution", "passes", "curvature", "step", "measuring", "saving", "rest")
"""In the order in which a job begins them; "rest" is what `unlearn` does beside them."""


class Phases:
    """Seconds and peak memory of named parts of a job; a part inside another counts for itself only.

    The bytes that are read in all of them are those of calls that read; `count_mapped` adds files that are mapped.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor_seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self._open: list[str] = []
        self.bytes_read = 0
        self._began = self._now()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count what happens inside for a phase."""
        self._change()
        self._open.append(name)
        try:
            yield
        finally:
            self._change()
            self._open.pop()

    def count_mapped(self, folder: Path) -> None:
        """Count the files of a folder that are mapped into memory as read."""
        maps = Path("/proc/self/maps").read_text().splitlines()
        found = {Path(line.split(maxsplit=5)[5]) for line in maps if len(line.split(maxsplit=5)) == 6}
        self.bytes_read += sum(path.stat().st_size for path in found if path.parent == folder.resolve())

    def wrapped(self, name: str, call: Callable[..., Result]) -> Callable[..., Result]:
        """The same function, whose calls count for a phase."""

        @functools.wraps(call)
        def counted(*args: object, **kwargs: object) -> Result:
            with self.of(name):
                return call(*args, **kwargs)

        return counted

    @contextmanager
    def of_unlearn(self) -> Iterator[None]:
        """Count the parts of `unlearn` that runs inside."""
        parts = (
            (driver, "score_answers", "measuring"),
            (driver, "localize", "attribution"),
            (steps, "differentiate", "passes"),
            (SIMUOptimizer, "update_curvature", "curvature"),
            (Refresh, "after_step", "curvature"),
            (GradientBalance, "combine_", "step"),
            (SIMUOptimizer, "step", "step"),
        )
        with ExitStack() as opened:
            opened.enter_context(self.of("rest"))
            for owner, attribute, name in parts:
                opened.enter_context(patch.object(owner, attribute, self.wrapped(name, getattr(owner, attribute))))
            yield

    def _change(self) -> None:
        now = self._now()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now[0] - self._began[0]
            self.processor_seconds[name] = self.processor_seconds.get(name, 0.0) + now[1] - self._began[1]
            self.peak[name] = max(self.peak.get(name, 0), resident("VmHWM"))
            self.bytes_read += now[2] - self._began[2]
        # Linux starts its record of the largest size anew.
        Path("/proc/self/clear_refs").write_text("5")
        self._began = self._now()

    def _now(self) -> tuple[float, float, int]:
        lines = Path("/proc/self/io").read_text().splitlines()
        read = next(int(line.split()[1]) for line in lines if line.startswith("rchar"))
        return time.perf_counter(), time.process_time(), read
