"""The table of attribution within a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

from benchmarks.verdicts.parts import Row


def budgets(rows: Sequence[Row]) -> Iterator[str]:
    """Quality and cost of attribution on a pretrained model: means over the seeds."""
    base = next(row["seconds"] for row in rows if row["way"] == "midpoint 10, before")
    yield "| way | top 10 % of each layer | of the model | processor time | less than before | incomplete |"
    yield "|---|---|---|---|---|---|"
    for way in dict.fromkeys(row["way"] for row in rows):
        ours = [row for row in rows if row["way"] == way]
        cells = [f"{mean(row[key] for row in ours):.3f}" for key in ("layer", "global")]
        seconds = mean(row["seconds"] for row in ours)
        missed = [row["incompleteness_median"] for row in ours if "incompleteness_median" in row]
        cells += [f"{seconds:.1f} s", f"{base / seconds:.1f} times", f"{100 * mean(missed):.2g} %" if missed else ""]
        yield f"| {way} | {' | '.join(cells)} |"
