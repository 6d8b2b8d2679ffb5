"""A tutorial's page shows all of its example and what it prints; the example asserts its own claim."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

from tests.rules.sources import ROOT

EXAMPLES = sorted((ROOT / "examples" / "tutorials").glob("*.py"))
MARKER = re.compile(r"\s*# --8<-- \[(start|end):(\w+)\]")
SNIPPET = re.compile(r'^--8<-- "(examples/tutorials/\w+\.py):(\w+)"$', re.MULTILINE)
PRINTED = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def name(path: Path) -> str:
    return path.stem


def page(example: Path) -> str:
    return (ROOT / "docs" / "tutorials" / f"{example.stem}.md").read_text()


def sections(source: str) -> tuple[list[str], list[str]]:
    """The names of the sections of an example, and the lines of code that are in none of them."""
    names, outside, inside = [], [], None
    for line in source.splitlines():
        marker = MARKER.fullmatch(line)
        if marker is None:
            outside += [line] if inside is None and line.strip() else []
        elif marker[1] == "start":
            assert inside is None
            names.append(marker[2])
            inside = marker[2]
        else:
            assert inside == marker[2]
            inside = None
    return names, outside


def masked(text: str) -> list[str]:
    """Lines without their numbers, and without what a model says."""
    return [NUMBER.sub("0", re.sub(r"'[^']*'", "''", line)) for line in text.strip().splitlines()]


def numbers(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(re.sub(r"'[^']*'", "''", text))]


def assert_says(shown: str, printed: str) -> None:
    """The same words, and figures that another processor may have come to."""
    assert masked(shown) == masked(printed)
    for expected, found in zip(numbers(shown), numbers(printed), strict=True):
        assert abs(found - expected) <= max(0.1, 0.3 * expected), f"{expected} is shown, {found} was printed"


def test_every_tutorial_has_its_example() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(path.stem for path in (ROOT / "docs" / "tutorials").glob("*.md"))


@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_a_page_shows_all_of_its_example_in_order(example: Path) -> None:
    source = example.read_text()
    names, outside = sections(source)
    assert [(str(example.relative_to(ROOT)), section) for section in names] == SNIPPET.findall(page(example))
    assert "\n".join(outside) == f'"""{ast.get_docstring(ast.parse(source))}"""'


@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_an_example_asserts_what_it_shows(example: Path) -> None:
    asserted = [node for node in ast.walk(ast.parse(example.read_text())) if isinstance(node, ast.Assert)]
    assert len(asserted) > 1


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_an_example_prints_what_its_page_shows(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    assert_says("".join(PRINTED.findall(page(example))), capfd.readouterr().out)


@pytest.mark.parametrize(
    "printed", ["0.10 before, 0.50 after 90 steps", "0.97 before, 0.10 after", "0.97 before, 0.10 after 300 steps"]
)
def test_another_figure_or_word_than_the_page_shows_is_seen(printed: str) -> None:
    assert_says("0.97 before, 0.10 after 100 steps", "0.96 before, 0.09 after 90 steps")
    with pytest.raises((AssertionError, ValueError)):
        assert_says("0.97 before, 0.10 after 100 steps", printed)
