"""Plots name every line beside it, say what is better and where the target is, and are drawn for any ground."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_simu import NeuronSelection
from torch_simu.unlearning.report import plots, style

NAMES = ["before", *(f"method_{number}" for number in range(8)), "retrained"]
heights = st.lists(st.floats(0, 1), min_size=1, max_size=len(NAMES))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that are drawn."""
    found: list = []
    made = plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda *size: found.append(made(*size)) or found[-1])
    return found


def test_each_method_has_a_point_and_a_label_with_its_marker_and_color(tmp_path: Path, figures: list) -> None:
    points = {name: (number / 10, 1 - number / 20) for number, name in enumerate(NAMES)}
    plots.plot_attack(points, tmp_path / "attack.png", kept="kept")
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.texts] == NAMES
    single = [line for line in axes.lines if line.get_linestyle() == "None"]
    looks = {(line.get_xdata()[0], line.get_ydata()[0]): (line.get_color(), line.get_marker()) for line in single}
    beside = {y: look for (x, y), look in looks.items() if x > 1.02}
    for text in axes.texts:
        assert beside[text.get_position()[1]] == looks[points[text.get_text()]] and text.get_color() == style.INK
    assert len({looks[point] for point in points.values()}) == len(NAMES)
    assert "lower is better" in axes.get_ylabel() and "better" in axes.get_xlabel()


def records(values: list[tuple[float, float, float]]) -> list[dict]:
    return [
        {"forget_probability": at, "monitor": {"retain": {"em": retain}, "world": {"em": world}}}
        for at, retain, world in values
    ]


def test_curves_share_their_axes_run_toward_forgotten_and_are_no_zoom_on_a_token(tmp_path: Path, figures: list) -> None:
    logs = {"simu": records([(0.5, 1.0, 0.99), (0.1, 1.0, 0.98)]), "fo_graddiff": records([(0.4, 1.0, 1.0)])}
    start = {"retain": 1.0, "world": 1.0, "forget_probability": 0.9}
    plots.plot_curves(logs, tmp_path / "a.png", sets=("retain", "world"), start=start, target=0.1)
    left, right = figures[0].axes
    assert left.get_ylim() == right.get_ylim() and left.get_xlim() == right.get_xlim() == (1, 0)
    assert left.get_ylim()[1] - left.get_ylim()[0] >= 0.2
    for axes in (left, right):
        said = [text.get_text().strip() for text in axes.texts]
        assert said == ["target 0.1", "simu", "fo_graddiff"] and "toward forgotten" in axes.get_xlabel()
    assert "higher is better" in left.get_ylabel()


@pytest.mark.parametrize("chosen", [None, "some"])
def test_the_heat_map_marks_the_selected_neurons_of_each_layer_and_no_others(tmp_path, figures, chosen) -> None:
    scores = {"a": torch.tensor([3.0, 1.0, 2.0, -1.0], dtype=torch.float64), "b": torch.zeros(4, dtype=torch.float64)}
    attribution = SimpleNamespace(scores=scores)
    selection = NeuronSelection({"a": [0, 1]}, {"a": 4}) if chosen else None
    plots.plot_attribution(attribution, tmp_path / "a.png", selection=selection)
    bars = [(bar.get_x(), bar.get_height()) for bar in figures[0].axes[0].patches]
    # In the order of their scores, neuron 0 is the first and neuron 1 the third.
    assert [x for x, height in bars if height] == ([0.0, 50.0] if chosen else [])
    labels = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert labels == ["a", "b"] and ("selected" in figures[0].axes[0].get_xlabel()) is bool(chosen)


def test_a_plot_is_a_png_and_an_svg_without_a_ground_and_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        plots.plot_attack({"a$b$": (0.5, 0.5), "<b>": (0.1, 0.2)}, tmp_path / f"{name}.png", kept="kept")
    from matplotlib.image import imread

    assert imread(tmp_path / "one.png")[0, 0, 3] == 0
    for suffix in ("png", "svg"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()
    drawing = (tmp_path / "one.svg").read_text()
    assert "<b>" not in drawing.replace("<!-- <b> -->", "")
    assert ElementTree.fromstring(drawing).tag.endswith("svg")


@given(heights)
def test_labels_are_a_line_apart_in_the_order_of_their_points_and_inside(values: list[float]) -> None:
    wanted = dict(zip(NAMES, values, strict=False))
    found = style.spread(wanted)
    assert found.keys() == wanted.keys()
    ordered = sorted(found, key=lambda name: found[name])
    assert all(wanted[low] <= wanted[high] for low, high in itertools.pairwise(ordered))
    placed = [found[name] for name in ordered]
    assert all(high - low >= style.LEAST_GAP - 1e-9 for low, high in itertools.pairwise(placed))
    assert placed[0] >= -1e-9 and placed[-1] <= 1 + 1e-9


def test_a_label_that_is_alone_stands_at_its_point() -> None:
    assert style.spread({"a": 0.3, "b": 0.9}) == {"a": 0.3, "b": 0.9}


def _contrast(color: str, ground: str) -> float:
    def light(text: str) -> float:
        parts = [int(text[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    one, two = sorted((light(color), light(ground)), reverse=True)
    return (one + 0.05) / (two + 0.05)


def test_ink_and_colors_stand_out_from_paper_and_from_a_dark_page() -> None:
    for ground in ("#ffffff", "#14161a"):
        assert _contrast(style.INK, ground) >= 3.9
        assert all(_contrast(color, ground) >= 2 for color in style.COLORS)
