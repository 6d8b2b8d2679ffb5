"""The table of steps beside those of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from benchmarks.optimizer.contenders import OURS
from benchmarks.verdicts.optimizer import ratio_of
from benchmarks.verdicts.parts import Row

LIMIT = "limit: what must be moved, at the speed of the copy"


def beside(rows: Sequence[Row]) -> Iterator[str]:
    """Medians of processor time and of time on the clock, and the ratio to ours in the same rounds."""
    yield "| step | processor time | on the clock | over simu_graddiff (95 % interval) |"
    yield "|---|---|---|---|"
    named = [{"optimizer": LIMIT, **row} for row in rows]
    for row in named:
        name = row["optimizer"]
        if "does_not_run" in row:
            yield f"| {name} | does not run: {row['does_not_run']} | | |"
            continue
        times = [f"{median(row[key]):.2f} ms" for key in ("processor_milliseconds", "milliseconds")]
        ratio, low, high = ratio_of(named, name, OURS) or (0.0, 0.0, 0.0)
        cell = f"{ratio:.2f} ({low:.2f}-{high:.2f})" if name != OURS else "1"
        yield f"| {name} | {' | '.join(times)} | {cell} |"
