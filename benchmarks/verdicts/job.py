"""What the rows say of whole jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.verdicts.parts import Part, Row, part

FULL = "full, AdamW"
LORA = ("LoRA, all layers, AdamW", "LoRA, down projections, AdamW")
OURS = ("simu", "simu_graddiff", "simu on 8-bit codes", "simu on 4-bit codes")


def job(rows: Sequence[Row]) -> Iterator[Part]:
    """Processor time over that of the faster LoRA, and peak memory over that of full fine-tuning."""
    found = {row["job"]: row for row in rows if "peak" in row}
    lora = min((processor(found[name]) for name in LORA if name in found), default=None)
    full = peak(found[FULL]) if FULL in found else None
    for name in OURS:
        ratio = processor(found[name]) / lora if name in found and lora else None
        yield part(f"processor time of {name} over that of LoRA with AdamW", ratio, "at most", 1.2)
        share = peak(found[name]) / full if name in found and full else None
        yield part(f"peak memory of {name} over that of full fine-tuning with AdamW", share, "at most", 0.5)


def processor(row: Row) -> float:
    """Processor seconds of all phases."""
    return sum(row["processor_seconds"].values())


def peak(row: Row) -> int:
    """The most memory that the process held in any phase, with what its imports hold."""
    return max(row["peak"].values())
