"""Whatever goes wrong is one line and status 2; with TORCH_SIMU_DEBUG=1 its traceback stands before the line."""

from __future__ import annotations

import pytest
from jinja2 import UndefinedError
from safetensors import SafetensorError

from tests.cli.test_help import UNLEARN, call
from torch_simu.cli.commands import jobs as commands

HINT = "(TORCH_SIMU_DEBUG=1 shows the traceback)"


class Panic(BaseException):
    """As Rust's panics are, which are no Exception."""


EXPECTED = [ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError]
UNEXPECTED = [UndefinedError, SafetensorError, AttributeError, AssertionError, ZeroDivisionError, Panic]


@pytest.fixture
def failing(monkeypatch):
    """Make the job of `unlearn` fail in a given way."""

    def fail_with(error: BaseException) -> None:
        def job(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(commands, "unlearn_job", job)

    monkeypatch.delenv("TORCH_SIMU_DEBUG", raising=False)
    return fail_with


@pytest.mark.parametrize("kind", EXPECTED)
def test_an_expected_error_is_its_message(kind, failing, capsys):
    failing(kind("first\n  second"))
    assert call(*UNLEARN) == 2
    assert capsys.readouterr().err == "torch-simu: first second\n"


@pytest.mark.parametrize("kind", UNEXPECTED)
def test_an_unexpected_error_is_one_line_with_its_kind_that_says_how_to_see_more(kind, failing, capsys):
    failing(kind("first\n  second"))
    assert call(*UNLEARN) == 2
    assert capsys.readouterr().err == f"torch-simu: {kind.__name__}: first second {HINT}\n"


@pytest.mark.parametrize("kind", EXPECTED + UNEXPECTED)
def test_the_traceback_of_any_error_is_shown_when_asked_for(kind, failing, capsys, monkeypatch):
    failing(kind("first\x1b[2J"))
    monkeypatch.setenv("TORCH_SIMU_DEBUG", "1")
    assert call(*UNLEARN) == 2
    *trace, last = capsys.readouterr().err.splitlines()
    assert trace[0] == "Traceback (most recent call last):" and any("in job" in line for line in trace)
    assert last.startswith("torch-simu: ") and r"first\x1b[2J" in last and HINT not in last
    assert not any("\x1b" in line for line in trace)


@pytest.mark.parametrize("value", ["", "0"])
def test_nothing_is_shown_where_the_variable_says_no(value, failing, capsys, monkeypatch):
    failing(AttributeError("wrong"))
    monkeypatch.setenv("TORCH_SIMU_DEBUG", value)
    assert call(*UNLEARN) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("text", "reason"), [("first\n  second", "first second"), ("", "it says no more")])
def test_the_end_of_a_file_is_an_error_and_no_interruption(text, reason, failing, capsys):
    failing(EOFError(text))
    assert call(*UNLEARN) == 2
    assert capsys.readouterr().err == (
        f"torch-simu: A file ends too early ({reason}), expected a whole one. Get it again.\n"
    )


def test_a_status_that_a_command_ends_with_is_no_error(failing, capsys):
    failing(SystemExit(7))
    assert call(*UNLEARN) == 7
    assert capsys.readouterr().err == ""
