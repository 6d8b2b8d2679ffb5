"""What the rows say of whole jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.verdicts.parts import Part, Row, part

LORA = ("LoRA, all layers, AdamW", "LoRA, down projections, AdamW")
OURS = ("simu", "simu_graddiff", "simu on 8-bit codes", "simu on 4-bit codes")


def job(rows: Sequence[Row]) -> Iterator[Part]:
    """Processor time over that of the faster LoRA, and peak memory over that of full fine-tuning."""
    found = {row["job"]: row for row in rows if "peak" in row}
    seconds = {name: sum(row["processor_seconds"].values()) for name, row in found.items()}
    peaks = {name: max(row["peak"].values()) for name, row in found.items()}
    lora = min((seconds[name] for name in LORA if name in seconds), default=None)
    full = peaks.get("full, AdamW")
    for name in OURS:
        ratio = seconds[name] / lora if name in seconds and lora else None
        yield part(f"processor time of {name} over that of LoRA with AdamW", ratio, "at most", 1.2)
        share = peaks[name] / full if name in peaks and full else None
        yield part(f"peak memory of {name} over that of full fine-tuning with AdamW", share, "at most", 0.5)
