"""What the rows say of bad calls, damaged files, kills and signals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.verdicts.parts import Part, Row, part


def withstood(rows: Sequence[Row]) -> Iterator[Part]:
    """How many of each kind of fault were withstood: all of them."""
    for row in rows:
        yield part(f"{row['what']} withstood", row["withstood"], "at least", row["tried"])
    if not rows:
        yield part("faults withstood", None, "at least", None)
