"""The plot of an attack shows each method once, at its point and with a label that no other one covers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_simu.unlearning.report import plots

NAMES = ["before", *(f"method_{number}" for number in range(8)), "retrained"]
heights = st.lists(st.floats(0, 1), min_size=1, max_size=len(NAMES))


def drawn(points: dict[str, tuple[float, float]], path: Path, monkeypatch: pytest.MonkeyPatch):
    """The axes of the plot."""
    figures = []
    made = plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *size: figures.append(made(*size)) or figures[-1])
    plots.plot_attack(points, path, kept="kept")
    return figures[0].axes[0]


def test_each_method_has_a_point_and_a_label_of_its_color(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {name: (number / 10, 1 - number / 20) for number, name in enumerate(NAMES)}
    axes = drawn(points, tmp_path / "attack.png", monkeypatch)
    assert (tmp_path / "attack.png").read_bytes()[1:4] == b"PNG"
    markers = {(line.get_color(), line.get_marker()): line for line in axes.lines if line.get_linestyle() == "None"}
    assert len(markers) == len(NAMES)
    labels = {text.get_text(): text.get_color() for text in axes.texts}
    assert list(labels) == NAMES
    found = {(line.get_xdata()[0], line.get_ydata()[0]): line.get_color() for line in markers.values()}
    assert found == {point: labels[name] for name, point in points.items()}


@given(heights)
def test_labels_are_a_line_apart_in_the_order_of_their_points_and_inside(values: list[float]) -> None:
    wanted = dict(zip(NAMES, values, strict=False))
    found = plots._spread(wanted)
    assert found.keys() == wanted.keys()
    ordered = sorted(found, key=lambda name: found[name])
    assert all(wanted[low] <= wanted[high] for low, high in itertools.pairwise(ordered))
    placed = [found[name] for name in ordered]
    assert all(high - low >= plots._LEAST_GAP - 1e-9 for low, high in itertools.pairwise(placed))
    assert placed[0] >= -1e-9 and placed[-1] <= 1 + 1e-9


def test_a_label_that_is_alone_stands_at_its_point() -> None:
    assert plots._spread({"a": 0.3, "b": 0.9}) == {"a": 0.3, "b": 0.9}
