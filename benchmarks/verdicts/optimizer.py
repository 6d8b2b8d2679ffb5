"""What the rows say of the time and memory of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
