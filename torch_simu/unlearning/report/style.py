"""Style of all plots: colors that all can tell apart, with markers and labels, for paper, light and dark pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch_simu._checks import problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Those of Okabe and Ito that show on light and on dark ground: told apart also by people who see few colors."""

MARKERS = ("o", "s", "^", "D", "v", "P", "<", ">", "p", "h", "d")
"""A marker for each line: without color they are told apart, too."""

INK = "#767676"
"""Text and axes: as far from white paper as from a dark page."""

LEAST_GAP = 0.055
"""The height of a line of text, as a share of the axes."""

_FIXED: Mapping[str, tuple[str, str]] = MappingProxyType({"before": (INK, "X"), "retrained": (INK, "*")})


def looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return a color and a marker for each name; "before" and "retrained", what there was and the floor, keep theirs.

    Examples:
        >>> looks(["before", "simu"])
        {'before': ('#767676', 'X'), 'simu': ('#0072B2', 'o')}
    """
    free = [name for name in names if name not in _FIXED]
    drawn = {name: (COLORS[n % len(COLORS)], MARKERS[n % len(MARKERS)]) for n, name in enumerate(free)}
    return {name: _FIXED.get(name) or drawn[name] for name in names}


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save in this style within the block; other plots of the process are left alone.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        advice = "Run: pip install matplotlib"
        raise ImportError(problem("matplotlib is not installed", "it for plots", advice)) from error
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    # Names come from files of others, and a dollar sign would make a formula of them. The same plot is the same file.
    settings: dict[Any, Any] = {"text.parse_math": False, "svg.hashsalt": "torch-simu", "svg.fonttype": "path"}
    with rc_context(settings | dict.fromkeys((*names, "grid.color"), INK)):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this width and height, in inches.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    with styled():
        # The object interface leaves the user's backend and open figures alone.
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure to a file as PNG, and as SVG of the same name beside it, both without a ground of their own."""
    with styled():
        figure.savefig(path, dpi=150, transparent=True)
        figure.savefig(Path(path).with_suffix(".svg"), transparent=True, metadata={"Date": None})


def spread(wanted: Mapping[str, float], gap: float = LEAST_GAP, high: float = 1.0) -> dict[str, float]:
    """Return heights for labels near those wanted, none nearer to the next than a gap, and none above `high`."""
    found: dict[str, float] = {}
    last = -float("inf")
    for name in sorted(wanted, key=lambda each: wanted[each]):
        last = found[name] = max(wanted[name], last + gap)
    # Down again from the top, where they were pushed over it.
    above = high + gap
    for name in reversed(found):
        above = found[name] = min(found[name], above - gap)
    return found


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], drawn: Mapping[str, tuple[str, str]]) -> None:
    """Write the name of each line or point beside the axes, with its marker, and a thin line from where it ends.

    Args:
        axes: With its limits set.
        ends: Name -> the point that is named.
        drawn: Name -> color and marker, from `looks`.
    """
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    heights = spread({name: y for name, (_, y) in ends.items()}, LEAST_GAP * (high - low), high)
    for name, (x, y) in ends.items():
        color, marker = drawn[name]
        beside, text = right + 0.05 * (right - left), right + 0.075 * (right - left)
        axes.plot((x, beside), (y, heights[name]), color=color, linewidth=0.5, alpha=0.6, clip_on=False)
        # In ink, with the marker before it: light colors are no colors for text.
        axes.plot(beside, heights[name], marker=marker, color=color, markersize=6, linestyle="", clip_on=False)
        axes.text(text, heights[name], name, va="center", fontsize="small")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
