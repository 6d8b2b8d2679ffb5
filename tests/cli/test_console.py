"""What the command line prints goes through `say` and `plain`: text of others is shown, and not acted on."""

from __future__ import annotations

import ast
import io
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from torch_simu import cli
from torch_simu.cli.console import plain, progress_bars, say

FILES = sorted(Path(str(cli.__file__)).parent.glob("*.py"))


@given(st.text())
def test_plain_text_has_nothing_that_a_terminal_acts_on(text: str) -> None:
    shown = plain(text)
    assert all(each.isprintable() or unicodedata.category(each) == "Zs" for each in shown)
    assert plain(shown) == shown
    # Lone surrogates, too, which no file can be written with.
    assert isinstance(plain(text + "\ud800").encode(), bytes)


@pytest.mark.parametrize("text", ["Zürich, Ærø, 東京 ☂", "a\u00a0b", "[bold]", r"C:\\x"])
def test_plain_text_of_people_stays_as_it_is(text: str) -> None:
    assert plain(text) == text


@given(st.text(max_size=200))
def test_one_line_is_printed_as_one_line_and_without_markup(text: str) -> None:
    written = io.StringIO()
    say(Console(file=written, width=10_000, force_terminal=False), text)
    assert written.getvalue().rstrip(" \n") == plain(text).rstrip(" ")


def test_the_bars_show_names_as_they_are() -> None:
    written = io.StringIO()
    with progress_bars(Console(file=written, width=200, force_terminal=False)) as tell:
        tell("evaluate [red]x[/]", 1, 1, "[bold]")
    assert "evaluate [red]x[/]" in written.getvalue() and "[bold]" in written.getvalue()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_the_console_prints(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    printed = [call.lineno for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "print"]
    assert path.name == "console.py" or not printed, f"lines {printed}: use say(console, line), one line at a time"
