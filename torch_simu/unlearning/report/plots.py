"""Plots: where the forget set sits, and what forgetting it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from torch_simu._checks import problem
from torch_simu.attribution import Attribution
from torch_simu.unlearning.checkpoint import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = 256
# Okabe and Ito: told apart also by people who see few colors.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
_MARKERS = "os^Dv"
_LEAST_GAP = 0.055


def plot_attribution(attribution: Attribution, path: str | Path, *, title: str = "Forget-set attribution") -> None:
    """Draw a heat map with a line per layer, its neurons in order of their score.

    Args:
        attribution: The scores. A layer with more neurons than the map has columns is averaged over neighbors in rank.
        path: Where the PNG goes.
        title: Title of the plot.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = _figure(8, 1.6 + 0.32 * len(attribution.scores))
    axes = figure.add_subplot()
    grid = torch.stack([_ranked(score.float()) for score in attribution.scores.values()])
    # The map is about where, so each layer has its own scale; its largest score stands at the end of its line.
    scale = grid.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    image = axes.imshow(
        (grid / scale).numpy(), aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, extent=(0, 100, len(grid), 0)
    )
    axes.set_yticks([number + 0.5 for number in range(len(grid))], list(attribution.scores))
    axes.set_xlabel("neurons of the layer, by score (%)")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label="score / largest of the layer")
    figure.savefig(path, dpi=130)


def plot_curves(
    logs: Mapping[str, Sequence[Record]],
    path: str | Path,
    *,
    sets: Sequence[str],
    start: Mapping[str, float] | None = None,
    target: float | None = None,
) -> None:
    """Draw how much of each set is kept (EM) against the forget probability, a line per method from right to left.

    Args:
        logs: Method -> step log of `unlearn` with monitored sets.
        path: Where the PNG goes.
        sets: Names of the monitored sets, a panel each.
        start: Set -> EM before the first step, and "forget_probability" then.
        target: Forget probability at which methods are compared.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = _figure(4.6 * len(sets), 4.0)
    for number, name in enumerate(sets):
        axes = figure.add_subplot(1, len(sets), number + 1)
        for method, log in logs.items():
            points = [
                (record["forget_probability"], record["monitor"][name]["em"]) for record in log if "monitor" in record
            ]
            if start is not None:
                points.insert(0, (start["forget_probability"], start[name]))
            axes.plot(*zip(*points, strict=True), marker=".", markersize=3, linewidth=1.2, label=method)
        if target is not None:
            axes.axvline(target, color="gray", linestyle=":", linewidth=1)
        axes.invert_xaxis()
        axes.set_xlabel("mean forget probability")
        axes.set_ylabel(f"{name} EM")
        axes.set_title(f"{name} set kept while forgetting")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="lower left")
    figure.savefig(path, dpi=130)


def plot_attack(points: Mapping[str, tuple[float, float]], path: str | Path, *, kept: str) -> None:
    """Draw what each method keeps against what an attack brings back: the best corner is the lower right one.

    Args:
        points: Method -> what it keeps, and the probability that comes back, both in [0, 1]. "before" and "retrained"
            are drawn in black: what there was, and the floor.
        path: Where the PNG goes.
        kept: What is kept, for the axis.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = _figure(7.0, 4.6)
    axes = figure.add_subplot()
    colors, markers = {"before": "black", "retrained": "black"}, {"before": "X", "retrained": "*"}
    for number, method in enumerate(method for method in points if method not in colors):
        colors[method], markers[method] = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
    heights = _spread({method: back for method, (_, back) in points.items()})
    for method, (share, back) in points.items():
        axes.plot(share, back, marker=markers[method], markersize=7, color=colors[method], linestyle="none", zorder=3)
        # Beside the axes, where no label covers a point; a thin line says which it belongs to.
        axes.plot((share, 1.04), (back, heights[method]), color=colors[method], linewidth=0.5, alpha=0.6, clip_on=False)
        axes.text(1.05, heights[method], method, color=colors[method], va="center", fontsize="small")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(kept)
    axes.set_ylabel("probability after relearning")
    axes.set_title("What is kept, and what comes back")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def check_plots() -> None:
    """Raise before the work begins when nothing could be drawn after it.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    _figure(1, 1)


def _spread(wanted: Mapping[str, float]) -> dict[str, float]:
    """Return heights for labels near those wanted, none nearer to the next than a line of text, from 0 upwards."""
    found: dict[str, float] = {}
    last = -_LEAST_GAP
    for name in sorted(wanted, key=lambda each: wanted[each]):
        last = found[name] = max(wanted[name], last + _LEAST_GAP)
    # Down again from the top, where they were pushed over it.
    above = 1.0 + _LEAST_GAP
    for name in reversed(found):
        above = found[name] = min(found[name], above - _LEAST_GAP)
    return found


def _figure(width: float, height: float) -> Figure:
    try:
        # The object interface leaves the user's backend and open figures alone.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            problem("matplotlib is not installed", "it for plots", "Run: pip install matplotlib")
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _ranked(score: Tensor) -> Tensor:
    ranked = score.sort(descending=True).values
    return functional.adaptive_avg_pool1d(ranked[None], min(_BINS, score.numel()))[0]
