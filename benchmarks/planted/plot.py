"""Draw the result of planted.py: how well each score finds planted columns, and what comes back after erasing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes

from torch_simu.unlearning.report.style import COLORS, INK, new_figure, save_figure, styled

_MEASURES = {
    "hidden": "after erasing",
    "hidden_after_unrelated": "after learning unrelated facts",
    "hidden_after_a_third": "after learning a third of the facts",
}


def plot_planted(result: Mapping, best_rules: Sequence[Mapping[str, str]], path: Path) -> None:
    """Write a picture with a panel of AUCs, each method under its rule of the tuning seeds, and one of relearning."""
    with styled():
        figure = new_figure(12.5, 5.2)
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
        _draw_scores(left, result["rows"], best_rules)
        _draw_relearning(right, result["rows"])
        save_figure(figure, path)


def _draw_scores(axes: Axes, rows: Sequence[Mapping], best_rules: Sequence[Mapping[str, str]]) -> None:
    lines = []
    for choice in best_rules:
        values = [row["auc"] for row in rows if row["kind"] == "scores" and choice.items() <= row.items()]
        objective = "" if choice["objective"] == "none" else f", {choice['objective']}"
        name = f"{choice['method'].replace('_', ' ')}{objective} ({choice['rule'].replace('_', ' ')})"
        lines.append((mean(values), name, values))
    lines.sort()
    for place, (middle, name, values) in enumerate(lines):
        color, marker = (COLORS[1], "D") if name.startswith("exact") else (COLORS[0], "o")
        axes.plot(values, [place] * len(values), marker, markersize=4, alpha=0.5, color=color)
        axes.plot(middle, place, "|", markersize=14, markeredgewidth=2, color=color)
    axes.set_yticks(range(len(lines)), [f"{name}  {middle:.3f}" for middle, name, _ in lines], fontsize="small")
    for where, what, line in ((0.5, "chance", ":"), (0.95, "target", "--")):
        axes.axvline(where, color=INK, linestyle=line, linewidth=1)
        axes.text(where, 1.0, f"{what} ", rotation=90, va="top", ha="right", transform=axes.get_xaxis_transform())
    axes.set_xlabel("AUC of planted columns, mean over layers (right is better; points: seeds, bar: their mean)")
    axes.set_title("Which score finds the planted columns")
    axes.grid(alpha=0.3)


def _draw_relearning(axes: Axes, rows: Sequence[Mapping]) -> None:
    ours = [row for row in rows if row["kind"] == "erase"]
    masks = list(dict.fromkeys(row["mask"] for row in ours))
    for shift, (measure, label) in enumerate(_MEASURES.items()):
        for place, mask in enumerate(masks):
            values = [row[measure]["probability"] for row in ours if row["mask"] == mask]
            where = place + 0.27 * (shift - 1)
            hatch = ("", "//", "xx")[shift]
            axes.bar(where, mean(values), 0.25, color=COLORS[shift], hatch=hatch, label=None if place else label)
            axes.plot([where] * len(values), values, ".", color=INK, markersize=3)
    axes.set_xticks(range(len(masks)), [mask.replace("_", "\n") for mask in masks], fontsize="small")
    axes.set_ylabel("probability of the other two thirds (lower is better)")
    axes.set_title("What comes back, by the mask that erased")
    axes.legend(fontsize="x-small", loc="upper left", frameon=False)
    axes.grid(alpha=0.3, axis="y")
    axes.margins(y=0.2)
