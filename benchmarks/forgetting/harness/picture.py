"""The cells as one picture: what each method keeps, against what relearning brings back."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.forgetting.harness.contenders import METHODS
from benchmarks.forgetting.harness.tables import by_method, only
from benchmarks.verdicts.forgetting import NEVER_UNLEARNED, compares, in_all, kept_by, relearned
from benchmarks.verdicts.paired import Interval, Value, interval
from benchmarks.verdicts.parts import Row
from torch_simu.unlearning.report.style import looks, new_figure, save_figure, styled

COLUMNS = 2


def over(rows: Sequence[Row], value: Value) -> Interval | None:
    """The interval of a figure over the runs that reached the target; None where one lacks it."""
    found = [value(row) for row in rows if compares(row)]
    return interval([each for each in found if each is not None]) if found and None not in found else None


def cell(axes: Axes, name: str, result: dict[str, Any], drawn: dict[str, tuple[str, str]]) -> None:
    """A cell as a panel: every method that reached the target as a point with its intervals."""
    rows = result["rows"]
    kept = in_all(kept_by(rows))
    for method, ours in by_method(rows):
        place = [over(ours, value) for value in (kept, relearned)]
        if method == "before" or place[0] is None or place[1] is None:
            continue
        color, marker = drawn[method]
        axes.errorbar(
            place[0].middle,
            place[1].middle,
            xerr=place[0].half,
            yerr=place[1].half,
            color=color,
            marker=marker,
            markersize=7,
            linewidth=1,
            alpha=0.85,
        )
    axes.set_title(f"{name} (seeds: {len(result['seeds'])})", fontsize="medium")
    axes.set_xlabel("kept, mean over the sets (right is better)", fontsize="small")
    axes.set_ylabel("relearned (lower is better)", fontsize="small")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(right=1.02)
    axes.spines[["top", "right"]].set_visible(False)


def draw_cells(paths: Sequence[Path], image: Path) -> None:
    """Write the picture of the cells in result files."""
    results = {
        " ".join(path.stem.removeprefix("lasting_").removesuffix("_cpu_202611").split("_")): only(
            json.loads(path.read_text()), [*NEVER_UNLEARNED, *METHODS]
        )
        for path in paths
    }
    methods = dict.fromkeys(row["method"] for result in results.values() for row in result["rows"])
    drawn = looks([method for method in methods if method != "before"])
    height = math.ceil(len(results) / COLUMNS)
    with styled():
        figure = new_figure(9, 3.3 * height + 2.2)
        panels = figure.subplots(height, COLUMNS, squeeze=False).flatten()
        for axes in panels[len(results) :]:
            axes.set_axis_off()
        for axes, (name, result) in zip(panels, results.items(), strict=False):
            cell(axes, name, result, drawn)
        for method, (color, marker) in drawn.items():
            panels[0].plot([], [], linestyle="", marker=marker, color=color, label=method)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
        save_figure(figure, image)
