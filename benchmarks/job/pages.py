"""Table and plot of whole jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes

from benchmarks.verdicts.job import FULL, LORA, peak, processor
from benchmarks.verdicts.parts import Row
from torch_simu.unlearning.report.style import COLORS, INK

PARTS = {
    "load": ("load",),
    "attribution": ("attribution",),
    "passes": ("passes",),
    "curvature": ("curvature",),
    "step": ("step",),
    "measuring": ("measuring",),
    "saving and rest": ("saving", "rest"),
}
"""What is shown together."""


def jobs(rows: Sequence[Row]) -> Iterator[str]:
    """Processor seconds of each job by phase, its peak memory, and what it reads and saves."""
    found = [row for row in rows if "peak" in row]
    lora = min((processor(row) for row in found if row["job"] in LORA), default=None)
    full = next((peak(row) for row in found if row["job"] == FULL), None)
    yield f"| job | processor time | over LoRA | {' | '.join(PARTS)} | peak memory | over full | read | saved |"
    yield "|---" * (7 + len(PARTS)) + "|"
    for row in rows:
        if "does_not_run" in row:
            yield f"| {row['job']} | does not run: {row['does_not_run']} |" + " |" * (5 + len(PARTS))
            continue
        cells = [f"{processor(row):.1f} s", f"{processor(row) / lora:.2f}" if lora else ""]
        cells += [f"{seconds:.1f}" if (seconds := seconds_of(row, each)) else "" for each in PARTS]
        cells += [f"{peak(row) / 1e9:.2f} GB", f"{peak(row) / full:.2f}" if full else ""]
        cells += [f"{row[key] / 1e6:.1f} MB" for key in ("bytes_read", "bytes_saved")]
        yield f"| {row['job']} | {' | '.join(cells)} |"


def seconds_of(row: Row, part: str) -> float:
    """Processor seconds of what is shown together."""
    return sum(row["processor_seconds"].get(name, 0.0) for name in PARTS[part])


def draw_jobs(axes: Axes, rows: Sequence[Row]) -> None:
    """Where the processor time of each job goes, as bars that are stacked."""
    found = [row for row in rows if "peak" in row]
    hatches = ("", "//", "", "xx", "", "..", "")
    left = [0.0] * len(found)
    for (part, hatch), color in zip(zip(PARTS, hatches, strict=True), (*COLORS, INK), strict=True):
        seconds = [seconds_of(row, part) for row in found]
        axes.barh([row["job"] for row in found], seconds, 0.7, left=left, label=part, color=color, hatch=hatch)
        left = [before + more for before, more in zip(left, seconds, strict=True)]
    axes.bar_label(axes.containers[-1], [f" {peak(row) / 1e9:.1f} GB" for row in found], fontsize=8)
    axes.set_xlim(right=1.12 * max(left))
    axes.invert_yaxis()
    one = found[0]
    about = f"{one['steps']} steps of {one['batch_size']} rows to forget and {one['batch_size']} to keep, one thread"
    axes.set_xlabel(f"seconds of processor time, and the peak of memory (left is better)\n{about}")
    axes.legend(frameon=False, fontsize="small", ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0))
