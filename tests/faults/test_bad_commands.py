"""A bad command line gets one line on standard error and status 2, and neither writes nor removes a file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.commands import KINDS, Words
from tests.language import ROWS, tiny_model, word_tokenizer
from torch_simu.cli.app import main

COMMANDS = [pytest.param(make, id=f"{kind.__name__}: {name}") for kind in KINDS for name, make in kind()]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and two files of rows."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = word_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, rows in (("forget", ROWS[:1]), ("retain", ROWS[1:])):
        lines = (json.dumps({"question": row.question, "answer": row.answer}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def files(originals: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a command may spoil."""
    shutil.copytree(originals, tmp_path / "files")
    return tmp_path / "files"


def content(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_there_are_at_least_250_bad_command_lines() -> None:
    assert len(COMMANDS) >= 250


@pytest.mark.parametrize("make", COMMANDS)
def test_a_bad_command_line_gets_one_line_and_changes_nothing(
    make: Callable[[Path], Words], files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    words = make(files)
    before = content(files)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    assert content(files) == before
