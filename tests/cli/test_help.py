"""Help is a page and no error, its examples work, and every option of a run reaches the configuration of the run."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import torch_simu
from tests.cli.test_console_blocks import TARGET_MISSED, made, place, quick  # noqa: F401 (fixtures)
from torch_simu.cli.app import app, main
from torch_simu.cli.commands import jobs as commands
from torch_simu.unlearning.config import UnlearnConfig

ROOT = typer.main.get_command(app)


def walk(command=ROOT, path=()) -> Iterator[tuple[str, ...]]:
    """The words of every command and group."""
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))


PATHS = list(walk())


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code


def page(capsys, *words: str) -> str:
    """What a command prints, which is no error."""
    assert call(*words) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def examples_of(text: str) -> list[list[str]]:
    """The commands at the end of a page, as words."""
    lines = text.split("Examples:\n")[1].replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def parse(words: list[str]) -> None:
    """Read a command line as the command does, without running it."""
    command, context, rest = ROOT, None, list(words)
    while hasattr(command, "commands"):
        context = command.make_context(command.name, list(rest), parent=context)
        command = command.commands[rest.pop(0)]
    command.make_context(command.name, rest, parent=context)


def test_the_version_is_that_of_the_package(capsys):
    assert page(capsys, "--version") == f"torch-simu {torch_simu.__version__}\n"


@pytest.mark.parametrize("words", [(), ("patch",)])
def test_a_group_without_a_command_shows_its_page(words, capsys):
    shown = page(capsys, *words)
    assert shown == page(capsys, *words, "--help") and "Commands:" in shown and shown.count("\n") > 10


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_page_ends_with_examples_that_are_read_without_an_error(path, capsys):
    shown = page(capsys, *path, "-h")
    assert shown == page(capsys, *path, "--help")
    assert all(len(line) <= 80 for line in shown.splitlines())
    found = examples_of(shown)
    assert found
    for words in found:
        assert words[0] == "torch-simu" and tuple(words[1 : 1 + len(path)]) == path
        parse(words[1:])


def test_an_example_with_a_wrong_option_is_seen():
    with pytest.raises(typer.BadParameter.__bases__[0], match="No such option"):
        parse(["unlearn", "--frobnicate", "1"])


def test_the_examples_run_one_after_the_other(place, capsys):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    found = [tuple(words) for path in PATHS for words in examples_of(page(capsys, *path, "-h"))]
    # The demo trains for minutes; what it does has tests of its own.
    for words in dict.fromkeys(words for words in found if words[1] != "demo"):
        assert call(*quick(words[1:])) in (0, TARGET_MISSED), (words, capsys.readouterr().err)
    assert {"OUT_DIR", "OUT_8BIT", "SCORES_DIR", "REVERTED_DIR", "audit.json"} <= set(os.listdir())


@pytest.fixture
def configured(monkeypatch):
    """The configurations that jobs were called with; none of them runs."""
    found: list[UnlearnConfig] = []

    def job(*args: object, **_: object) -> None:
        found.extend(each for each in args if isinstance(each, UnlearnConfig))
        raise ValueError("stopped")

    for name in ("unlearn_job", "attribute_job"):
        monkeypatch.setattr(commands, name, job)
    return found


UNLEARN = ("unlearn", "--model", "m", "--forget", "f", "--retain", "r", "--out", "o")
ATTRIBUTE = ("attribute", "--model", "m", "--forget", "f", "--out", "o")


@pytest.mark.parametrize(
    ("option", "given", "value"),
    [
        ("rho", "0.5", 0.5),
        ("betas", "0.9,0.95", (0.9, 0.95)),
        ("betas", "0.9, 0.95", (0.9, 0.95)),
        ("hessian_interval", "3", 3),
        ("clip", "0.25", 0.25),
        ("scope", "global", "global"),
        ("attribution_steps", "7", 7),
        ("attribution_budget", "31", 31),
        ("attribution_budget", "10m", "10m"),
        ("attribution_rows", "11", 11),
        ("checkpoint_interval", "2", 2),
        ("weight_decay", "0.125", 0.125),
    ],
)
def test_an_option_of_unlearn_reaches_the_field_of_its_name_and_no_other(option, given, value, configured):
    call(*UNLEARN)
    call(*UNLEARN, f"--{option.replace('_', '-')}", given)
    before, after = configured
    assert after == before.updated(**{option: value}) != before


@pytest.mark.parametrize(
    ("option", "given", "field"),
    [
        ("scope", "global", "scope"),
        ("rows", 11, "attribution_rows"),
        ("budget", "90s", "attribution_budget"),
    ],
)
def test_an_option_of_attribute_reaches_its_field_and_no_other(option, given, field, configured):
    call(*ATTRIBUTE)
    call(*ATTRIBUTE, f"--{option}", given)
    before, after = configured
    assert after == before.updated(**{field: given}) != before


def test_a_run_without_options_is_the_configuration_of_the_class_with_one_batch_size(configured):
    call(*UNLEARN)
    sizes = {f"{name}_batch_size": 16 for name in ("forget", "retain", "hessian", "eval")}
    assert configured == [UnlearnConfig(**sizes)]


@pytest.mark.parametrize("given", ["0.9", "0.9,0.99,0.5", "a,b", ""])
def test_betas_that_are_not_two_numbers_are_refused_with_an_example(given, configured, capsys):
    assert call(*UNLEARN, "--betas", given) == 2
    assert f"betas is {given!r}, expected two numbers, 0.965,0.99 say." in capsys.readouterr().err
    assert not configured


def test_a_page_of_the_documentation_shows_no_option_that_is_not_there():
    known = {name for path in PATHS for name in _options(path)}
    pages = [*Path(torch_simu.__file__).parents[1].glob("docs/**/*.md")]
    named = {word for each in pages for word in re.findall(r"`torch-simu [^`]*?(--[\w-]+)", each.read_text())}
    assert named and named <= known


def _options(path: tuple[str, ...]) -> Iterator[str]:
    command = ROOT
    for name in path:
        command = command.commands[name]
    for param in command.params:
        yield from param.opts
