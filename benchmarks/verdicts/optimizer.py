"""What the rows say of the time and memory of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import comb
from statistics import median

from benchmarks.verdicts.parts import Part, Row, part


def step(rows: Sequence[Row]) -> Iterator[Part]:
    """Speed over other optimizers on the size that the claim names."""
    medians = {
        row["optimizer"]: row["median"]
        for row in rows
        if (row["size"], row["fraction"]) == ("bar", 0.05) and "median" in row
    }

    def over(theirs: str, ours: str) -> float | None:
        return medians[theirs] / medians[ours] if {theirs, ours} <= medians.keys() else None

    yield part("times faster than dense masked Sophia", over("dense_masked_sophia", "simu"), "at least", 15)
    yield part("times faster than fused AdamW", over("adamw_fused", "simu"), "at least", 2)
    compact = over("dense_masked_sophia", "simu_compact")
    yield part("on compact parameters, times faster than dense masked Sophia", compact, "at least", 40)


def memory(rows: Sequence[Row]) -> Iterator[Part]:
    """State over that of the selected columns, the largest of all sizes and fractions."""
    for name in ("simu", "simu_compact"):
        ratios = [row["state_ratio"] for row in rows if row["optimizer"] == name and "state_ratio" in row]
        yield part(f"state of {name} over two compact moments", max(ratios, default=None), "at most", 1.02)


def whitened(rows: Sequence[Row]) -> Iterator[Part]:
    """Best time of a whitened step over that of a diagonal one, on the clock and of the processor."""
    found = {row["curvature"]: row for row in rows if (row["what"], row["fraction"]) == ("step", 0.05)}
    for key, name in (("processor_milliseconds", "processor time"), ("milliseconds", "time on the clock")):
        known = {"neurons", "diagonal"} <= found.keys()
        ratio = min(found["neurons"][key]) / min(found["diagonal"][key]) if known else None
        yield part(f"{name} of a step whitened by its neurons, over the diagonal one", ratio, "at most", 2)


def peers(rows: Sequence[Row]) -> Iterator[Part]:
    """Processor time of each peer over that of ours, in the same rounds."""
    for theirs, bar in (
        ("dense masked Sophia as SOUL publishes it", 5),
        ("dense masked Sophia, lean", 2),
        ("dense masked Sophia, lean, compiled", 1),
        ("AdamW, fused", 1),
    ):
        found = ratio_of(rows, theirs, "simu_graddiff")
        yield part(f"times faster than {theirs}", found and found[0], "at least", bar)
    found = ratio_of(rows, "LoRA, AdamW, fused", "simu_graddiff on deltas")
    yield part("on deltas, time of LoRA's step of as many numbers over ours", found and found[0], "at least", 1)


def ratio_of(rows: Sequence[Row], theirs: str, ours: str) -> tuple[float, float, float] | None:
    """Median over the rounds of one's processor time over another's, and the 95 % interval of that median.

    The interval is that of order statistics: it needs no distribution of the times.
    """
    times = {
        row["optimizer"]: row["processor_milliseconds"]
        for row in rows
        if "processor_milliseconds" in row and "optimizer" in row
    }
    if not {theirs, ours} <= times.keys():
        return None
    ratios = sorted(each / mine for each, mine in zip(times[theirs], times[ours], strict=True))
    return median(ratios), *interval(ratios)


def interval(ordered: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median of what was drawn independently; the range where there are few."""
    count = len(ordered)
    below, place = 0.0, 0
    while place < count // 2 and below + comb(count, place) / 2**count <= 0.025:
        below += comb(count, place) / 2**count
        place += 1
    place = max(place - 1, 0)
    return ordered[place], ordered[count - 1 - place]
