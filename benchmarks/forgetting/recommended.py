"""The recommended runs as a table, beside the default and the best of the grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch_simu.unlearning.pilot.words import AS_GIVEN

SETS = ("retain", "world")


def recommended(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for the recommended run of each model, the default, and the best of the grid by each set."""
    yield "| model | run | changes | steps | forget prob. | retain, kept | world, kept |"
    yield "|---|---|---|---|---|---|---|"
    for model in dict.fromkeys(row["model"] for row in rows):
        ours = [row for row in rows if row["model"] == model]
        grid = [row for row in ours if row["run"] == "grid" and row["reached"]]
        found = [(row["run"], row) for row in ours if row["run"] == "recommended"]
        found += [("default", row) for row in grid if row["changes"] == AS_GIVEN]
        found += [(f"best by {name}", max(grid, key=lambda row, name=name: row[name]["kept"])) for name in SETS if grid]
        for name, row in found:
            changes = row["changes"].split("--max-steps")[0].strip()
            cells = [model, name, changes if changes == AS_GIVEN else f"`{changes}`", str(row["steps"])]
            cells += [f"{value:.3f}" for value in (row["forget"]["probability"], *(row[each]["kept"] for each in SETS))]
            yield f"| {' | '.join(cells)} |"
