"""What the rows say of a GPU; rows of a processor say nothing of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.verdicts.parts import Part, Row, part


def gpu(rows: Sequence[Row]) -> Iterator[Part]:
    """Tests that failed, and speed and state of a step at the shapes of 7 billion parameters."""
    rows = [row for row in rows if row["device"] == "cuda"]
    tests = [row for row in rows if row.get("what") == "tests"]
    passed, failed = (sum(row[key] for row in tests) if tests else None for key in ("passed", "failed"))
    yield part("tests marked gpu that passed", passed, "at least", 300)
    yield part("tests marked gpu that failed", failed, "at most", 0)
    medians = {row["optimizer"]: row["median"] for row in rows if (row.get("what"), row.get("size")) == ("step", "7b")}
    known = {"dense_masked_sophia", "simu"} <= medians.keys()
    ratio = medians["dense_masked_sophia"] / medians["simu"] if known else None
    yield part("at 7 B, times faster than dense masked Sophia", ratio, "at least", 5)
    kept = [row for row in rows if row.get("what") == "memory"]
    states = [row["state_bytes"] / row["bytes_of_two_compact_moments"] for row in kept]
    yield part("state over two compact moments", max(states, default=None), "at most", 1.02)
    # Two compact moments and five gathered columns are the most that the first steps make.
    peaks = [row["peak_over_weights_and_gradients"] / row["bytes_of_two_compact_moments"] for row in kept]
    yield part("peak of the first three steps over two compact moments", max(peaks, default=None), "at most", 4)
