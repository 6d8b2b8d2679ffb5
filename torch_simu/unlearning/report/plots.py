"""Plots: where the forget set sits, and what forgetting it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from torch.nn import functional

from torch_simu.attribution import Attribution
from torch_simu.neurons import NeuronSelection
from torch_simu.unlearning.checkpoint import Record
from torch_simu.unlearning.report.style import COLORS, INK, label_ends, looks, new_figure, save_figure, styled

_BINS = 256
_MAP = 0.7
"""Share of a layer's line that its map takes; below it stand the marks of the selected neurons."""

_LEAST_LOSS = 0.2
"""The axis of what is kept spans at least this much: a step of one token is no cliff."""


def plot_attribution(
    attribution: Attribution,
    path: str | Path,
    *,
    selection: NeuronSelection | None = None,
    title: str = "Forget-set attribution",
) -> None:
    """Draw a heat map with a line per layer, its neurons in order of their score, and mark those that are selected.

    Args:
        attribution: The scores. A layer with more neurons than the map has columns is averaged over neighbors in rank.
        path: Where the PNG goes; an SVG goes beside it.
        selection: The selected neurons; None marks none.
        title: Title of the plot.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    with styled():
        figure = new_figure(8.6, 1.8 + 0.36 * len(attribution.scores))
        axes = figure.add_subplot()
        for line, (layer, scores) in enumerate(attribution.scores.items()):
            order = scores.argsort(descending=True)
            ranked = _pooled(scores.float()[order])
            # The map is about where, so each layer has its own scale; its largest score stands at the end of its line.
            scale = ranked.abs().amax().clamp(min=1e-30)
            image = axes.imshow(
                (ranked / scale)[None].numpy(),
                aspect="auto",
                cmap="RdBu_r",
                vmin=-1,
                vmax=1,
                extent=(0, 100, line + _MAP, line),
            )
            axes.text(101, line + 0.5, f"{scores.max().item():.2g}", va="center", fontsize="small")
            if selection is not None and layer in selection:
                share = _pooled(selection.mask(layer).float()[order])
                lefts = [100 * column / len(share) for column in range(len(share))]
                heights = [-(0.95 - _MAP) * each for each in share.tolist()]
                axes.bar(lefts, heights, 100 / len(share), bottom=line + 0.97, align="edge", color=COLORS[1])
        axes.set_xlim(0, 100)
        axes.set_ylim(len(attribution.scores), 0)
        axes.set_yticks([line + 0.5 for line in range(len(attribution.scores))], list(attribution.scores))
        marks = "" if selection is None else "\nmarks below a map: the share of the neurons there that is selected"
        axes.set_xlabel(f"neurons of the layer, in order of their score (%); beside it: the largest score{marks}")
        axes.set_title(title)
        figure.colorbar(image, ax=axes, label="score / largest of the layer")
        save_figure(figure, path)


def plot_curves(
    logs: Mapping[str, Sequence[Record]],
    path: str | Path,
    *,
    sets: Sequence[str],
    start: Mapping[str, float] | None = None,
    target: float | None = None,
) -> None:
    """Draw how much of each set is kept (EM) against the forget probability, a line per method from left to right.

    Args:
        logs: Method -> step log of `unlearn` with monitored sets.
        path: Where the PNG goes; an SVG goes beside it.
        sets: Names of the monitored sets, a panel each.
        start: Set -> EM before the first step, and "forget_probability" then.
        target: Forget probability at which methods are compared.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    with styled():
        figure = new_figure(5.6 * len(sets), 4.4)
        panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
        drawn, ends, lowest = looks(list(logs)), {}, 1.0 - _LEAST_LOSS
        for axes, name in zip(panels, sets, strict=True):
            for method, log in logs.items():
                points = [
                    (record["forget_probability"], record["monitor"][name]["em"])
                    for record in log
                    if "monitor" in record
                ]
                if start is not None:
                    points.insert(0, (start["forget_probability"], start[name]))
                color, marker = drawn[method]
                every = max(1, len(points) // 8)
                axes.plot(
                    *zip(*points, strict=True), color=color, marker=marker, markevery=every, markersize=4, linewidth=1.2
                )
                ends[name, method] = points[-1]
                lowest = min(lowest, *(kept for _, kept in points))
        for axes, name in zip(panels, sets, strict=True):
            axes.set_xlim(1.0, 0.0)
            axes.set_ylim(math.floor(10 * lowest) / 10, 1.02)
            if target is not None:
                axes.axvline(target, color=INK, linestyle=":", linewidth=1)
                axes.text(
                    target + 0.01, axes.get_ylim()[0], f"target {target:g} ", rotation=90, va="bottom", ha="right"
                )
            axes.set_xlabel("mean forget probability; to the right: toward forgotten")
            axes.set_title(f"{name} set kept while forgetting")
            axes.grid(alpha=0.25)
            label_ends(axes, {method: ends[name, method] for method in logs}, drawn)
        panels[0].set_ylabel("EM: share of right tokens (higher is better)")
        save_figure(figure, path)


def plot_attack(points: Mapping[str, tuple[float, float]], path: str | Path, *, kept: str) -> None:
    """Draw what each method keeps against what an attack brings back: the best corner is the lower right one.

    Args:
        points: Method -> what it keeps, and the probability that comes back, both in [0, 1]. "before" and "retrained"
            are drawn in ink: what there was, and the floor.
        path: Where the PNG goes; an SVG goes beside it.
        kept: What is kept, for the axis.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    with styled():
        figure = new_figure(7.4, 4.8)
        axes = figure.add_subplot()
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        drawn = looks(list(points))
        for method, (share, back) in points.items():
            color, marker = drawn[method]
            axes.plot(share, back, marker=marker, markersize=8, color=color, linestyle="none", zorder=3)
        label_ends(axes, points, drawn)
        axes.set_xlabel(f"{kept}; to the right: better")
        axes.set_ylabel("forget probability that relearning brings back\n(lower is better)")
        axes.set_title("What is kept, and what comes back")
        axes.grid(alpha=0.25)
        save_figure(figure, path)


def check_plots() -> None:
    """Raise before the work begins when nothing could be drawn after it.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    new_figure(1, 1)


def _pooled(ranked: Tensor) -> Tensor:
    return functional.adaptive_avg_pool1d(ranked[None], min(_BINS, ranked.numel()))[0]
