"""Draw the plots of the docs from the result files.

Usage: python -m benchmarks.plots
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes

from benchmarks.forgetting.harness.picture import draw_cells
from benchmarks.job.pages import draw_jobs
from benchmarks.planted.plot import plot_planted
from benchmarks.results import RESULTS
from benchmarks.tables import loaded
from torch_simu.unlearning.demo.attacked import plot_brought_back
from torch_simu.unlearning.report.plots import plot_curves
from torch_simu.unlearning.report.result import MethodResult
from torch_simu.unlearning.report.style import COLORS, INK, label_ends, looks, new_figure, save_figure, styled

IMAGES = Path(__file__).parent.parent / "docs" / "images"


def times(axes: Axes) -> None:
    """Seconds of each method of attribution, and the rank correlation with one pass per prefix."""
    result = loaded("attribution")
    for place, (each, label) in enumerate(zip(result["summary"], ("all positions", "a quarter"), strict=True)):
        seconds = each["best_seconds"]
        bars = axes.barh(
            [number + 0.4 * place for number in range(len(seconds))],
            seconds.values(),
            0.38,
            label=label,
            color=COLORS[place],
            hatch="" if place else "//",
        )
        ranks = [min(row["spearman"] for row in result["rows"] if row["method"] == name) for name in seconds]
        axes.bar_label(bars, [f"rank {rank:.2f}" if not place else "" for rank in ranks], padding=3, fontsize=8)
    axes.set_yticks([number + 0.2 for number in range(len(seconds))], [name.replace("_", " ") for name in seconds])
    axes.set_xscale("log")
    axes.set_xlim(right=4 * max(result["summary"][0]["best_seconds"].values()))
    axes.invert_yaxis()
    # The axis would write its powers as formulas, which the style shows as they stand.
    axes.xaxis.set_major_formatter("{x:g}")
    about = "4 layers, d 192, 10 path points, one thread"
    axes.set_xlabel(f"seconds for one sequence of 48 tokens (left is better)\n{about}")
    axes.legend(title="scored", frameon=False)


def knockout(axes: Axes) -> None:
    """Loss of the forget set against that of the retain set without the highest-scored neurons of each layer."""
    rows = [row for row in loaded("knockout")["rows"] if "forget" in row]
    names = [name for name in dict.fromkeys(row["score"] for row in rows) if name != "none"]
    drawn, ends = looks(names), {}
    for name in names:
        shares = sorted({row["share"] for row in rows})
        ours = [[row for row in rows if row["share"] == share and row["score"] in (name, "none")] for share in shares]
        points = [[mean(row[each]["nll"] for row in group) for group in ours] for each in ("retain", "forget")]
        style = "--" if name in ("random", "loss (literal)") else "-"
        color, marker = drawn[name]
        axes.plot(*points, style, marker=marker, color=color)
        ends[name] = (points[0][-1], points[1][-1])
    axes.set_title("without the top 3, 10, 30 % of the neurons by", fontsize="medium", loc="right")
    axes.set_xlabel("retain set: negative log-likelihood, nats per token (left is better)")
    axes.set_ylabel("forget set: negative log-likelihood,\nnats per token (up is better)")
    label_ends(axes, ends, drawn)


def directions(axes: Axes) -> None:
    """How much of a change of the weights lies in the leading directions of the forget set's activations."""
    result = loaded("directions")
    diagonal = "the same with Sophia's diagonal and clip"
    lines = {
        "changed by an attacker, behind simu": ("simu", "relearning"),
        "changed by the diagonal": (diagonal, "method"),
        "changed by simu": ("simu", "method"),
    }
    places = [100 * share for share in result["leading"]]
    for (name, (method, change)), (color, marker) in zip(lines.items(), looks(list(lines)).values(), strict=True):
        rows = [row["shares"] for row in result["rows"] if (row["method"], row["change"]) == (method, change)]
        columns = list(zip(*rows, strict=True))
        axes.plot(places, [100 * mean(each) for each in columns], marker=marker, color=color, label=name)
        axes.fill_between(
            places,
            [100 * min(each) for each in columns],
            [100 * max(each) for each in columns],
            alpha=0.15,
            color=color,
        )
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.set_ylim(0, 102)
    axes.set_xlabel("leading directions of the forget set's activations (% of a layer's)")
    axes.set_ylabel("squared change of the weights in them (%)")
    axes.legend(frameon=False)


def relearning(axes: Axes) -> None:
    """Extraction strength of forget people who are not shown, while others are."""
    rows = [
        row
        for row in loaded("robustness")["rows"]
        if row["attack"] in ("none", "relearned from a third of the forget people")
    ]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    drawn, ends = looks(methods), {}
    for method in methods:
        ours = [row for row in rows if row["method"] == method]
        steps = sorted({row.get("relearn_steps", 0) for row in ours})
        values = [[row["forget"]["es"] for row in ours if row.get("relearn_steps", 0) == step] for step in steps]
        style = "--" if method in ("before", "retrained") else "-"
        color, marker = drawn[method]
        axes.plot(steps, [mean(each) for each in values], style, marker=marker, color=color)
        axes.fill_between(
            steps, [min(each) for each in values], [max(each) for each in values], alpha=0.12, color=color
        )
        ends[method] = (steps[-1], mean(values[-1]))
    axes.set_xlabel("steps of relearning from a third of the forget people (bands: the seeds)")
    axes.set_ylabel("extraction strength of the others (lower is better)")
    label_ends(axes, ends, drawn)


def budgets(axes: Axes) -> None:
    """Which share of the top neurons each way names, against the passes that a row takes."""
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in loaded("attribution_quality")["rows"]:
        points.setdefault(row["where"], {}).setdefault(row["way"], []).append((row["passes"], row["layer"]))
    for row in loaded("attribution_budget")["rows"]:
        if "passes" in row:
            points.setdefault("pretrained", {}).setdefault(row["way"], []).append((row["passes"], row["layer"]))
    drawn = looks(list(points))
    # Fewer tokens, and older code, are no points of the curve.
    ways = ({way: at for way, at in each.items() if not way.endswith(("tokens", "before"))} for each in points.values())
    points = dict(zip(points, ways, strict=True))
    for where, ways in points.items():
        color, marker = drawn[where]
        middle = {way: (found[0][0], mean(share for _, share in found)) for way, found in ways.items()}
        steps = [place for way, place in middle.items() if way.startswith("gradient")]
        path = sorted(place for way, place in middle.items() if not way.startswith("gradient"))
        axes.plot(*zip(*path, strict=True), "-", marker=marker, color=color, label=where)
        axes.plot(*zip(*steps, strict=True), linestyle="none", marker="x", markersize=7, color=color)
    axes.axhline(0.9, color=INK, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("passes of a row (left is better; crosses: gradient x activation)")
    axes.set_ylabel("share of the top 10 % of each layer (higher is better)")
    axes.legend(frameon=False, loc="lower right")


def draw(name: str, plot: Callable[[Axes], None], width: float, height: float) -> None:
    """Write one plot."""
    with styled():
        figure = new_figure(width, height)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        plot(axes)
        save_figure(figure, IMAGES / f"{name}.png")


def draw_demo(result: Mapping[str, Any]) -> None:
    """Write what is kept while the demo's first seed forgets, and what comes back of it."""
    curves, seed = result["curves"], result["seeds"][0]
    plot_curves(
        curves["logs"],
        IMAGES / "demo_forgetting.png",
        sets=("retain", "world"),
        start=curves["start"],
        target=curves["target"],
    )
    found = {
        row["method"]: MethodResult.from_json({key: row[key] for key in row if key not in ("seed", "method")})
        for row in result["rows"]
        if row["seed"] == seed
    }
    plot_brought_back(found, IMAGES / "demo_attack.png")


def main() -> None:
    draw("attribution_time", times, 8, 4.2)
    draw("knockout", knockout, 6.4, 4.4)
    draw("attribution_budgets", budgets, 6.8, 4.2)
    draw("directions", directions, 6.8, 4.2)
    draw("relearning", relearning, 6.8, 4.4)
    draw_cells(sorted(RESULTS.glob("lasting_*.json")), IMAGES / "cells.png")
    draw_demo(loaded("demo"))
    plot_planted(loaded("planted"), loaded("planted_tuning")["best_rules"], IMAGES / "planted.png")
    draw("job", lambda axes: draw_jobs(axes, loaded("job")["rows"]), 8, 4.4)


if __name__ == "__main__":
    main()
