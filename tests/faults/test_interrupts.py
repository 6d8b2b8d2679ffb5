"""Ctrl-C and SIGTERM end a command in order: one line that says how to go on, and a status that names the signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.language import ROWS, tiny_model, word_tokenizer
from torch_simu.cli import app, jobs, measuring
from torch_simu.cli.app import main

ROOT = Path(__file__).parents[2]
UNLEARN = "unlearn --model model --forget forget.jsonl --retain retain.jsonl --out out --forget-target 0".split()
ATTRIBUTE = "attribute --model model --forget forget.jsonl --out out --steps 1000000".split()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and two files of rows."""
    tokenizer = word_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, rows in (("forget", ROWS[:1]), ("retain", ROWS[1:])):
        lines = (json.dumps({"question": row.question, "answer": row.answer}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stopped(place: Path, words: list[str], at: str, number: signal.Signals) -> tuple[int, list[str]]:
    """Send a signal to a command when a file is there; its status, and its lines on standard error."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch_simu", *words]
    with subprocess.Popen(
        command,
        cwd=place,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Tests in the background of a shell inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not (place / at).exists() and process.poll() is None:
            time.sleep(0.02)
        # The file appears a moment before the work behind it begins.
        time.sleep(0.2)
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, errors.splitlines()


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Call a command here; its status, and its lines on standard error."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    return stop.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_the_step_from_which_it_goes_on(
    number: signal.Signals, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, (line,) = stopped(place, [*UNLEARN, "--max-steps", "100000"], "out.run/run.safetensors", number)
    assert status == 128 + number
    told = "torch-simu: Interrupted. Call the same command again to go on after step "
    assert line.startswith(told) and line.endswith(".")
    step = int(line.removeprefix(told)[:-1])
    assert step >= 20
    assert sorted(path.name for path in place.iterdir() if "out" in path.name) == ["out.run"]
    status, _ = run([*UNLEARN, "--max-steps", str(step + 1)], capsys)
    assert status == 3
    log = [json.loads(line) for line in (place / "out" / "steps.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(1, step + 2))


@pytest.mark.parametrize(
    ("words", "number"),
    [(ATTRIBUTE, signal.SIGINT), (ATTRIBUTE, signal.SIGTERM), (["demo", "--out", "out"], signal.SIGTERM)],
)
def test_a_command_that_starts_anew_says_so_and_leaves_nothing(
    words: list[str], number: signal.Signals, place: Path
) -> None:
    before = sorted(place.rglob("*"))
    found = stopped(place, words, ".out.lock", number)
    assert found == (128 + number, ["torch-simu: Interrupted. Call the same command again; it starts anew."])
    assert sorted(place.rglob("*")) == before


def interrupting(monkeypatch: pytest.MonkeyPatch, where: object, name: str) -> None:
    """Let a function send a Ctrl-C to this process when it is called."""

    def stop(*arguments: object, **options: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(where, name, stop)


def test_before_the_first_step_it_says_what_is_saved(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        interrupting(patched, jobs, "encode")
        found = run([*UNLEARN, "--max-steps", "2"], capsys)
        assert found == (130, ["torch-simu: Interrupted. Call the same command again; it starts anew."])
    with monkeypatch.context() as patched:
        patched.setattr("torch_simu.attribution.checkpoint._SECONDS", 0)
        interrupting(patched, sys.modules["torch_simu.unlearning.localization"], "check_complete")
        patched.setattr("torch_simu.attribution.checkpoint.Checkpoint.remove", lambda self: None)
        found = run([*UNLEARN, "--max-steps", "2", "--fraction", "0.5"], capsys)
        assert found == (130, ["torch-simu: Interrupted. Call the same command again to go on within the attribution."])
    with monkeypatch.context() as patched:
        interrupting(patched, sys.modules["torch_simu.unlearning.driver"], "make_optimizer")
        found = run([*UNLEARN, "--max-steps", "2", "--fraction", "0.5"], capsys)
        assert found == (130, ["torch-simu: Interrupted. Call the same command again to go on after the attribution."])
    # Outside of the work nothing is known but that results appear whole.
    interrupting(monkeypatch, measuring, "load_rows")
    status, (line,) = run([*UNLEARN, "--max-steps", "2"], capsys)
    assert status == 130 and line.endswith("it starts anew, unless its result is there.")


def test_an_interrupt_behind_the_last_step_says_that_the_result_is_complete(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        interrupting(patched, sys.modules["torch_simu.unlearning.report.folder"], "remove_folder")
        found = run([*UNLEARN, "--max-steps", "2"], capsys)
    assert found == (130, [f"torch-simu: Interrupted. The result is complete: {place / 'out'}"])
    assert (place / "out.run").exists()
    status, (line,) = run([*UNLEARN, "--max-steps", "2"], capsys)
    assert status == 2 and "exists and is not empty" in line
    assert not (place / "out.run").exists()


def test_a_second_process_on_one_result_gets_one_line_and_harms_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [*UNLEARN, "--max-steps", "100000"]
    with subprocess.Popen(
        [sys.executable, "-m", "torch_simu", *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while not (place / "out.run" / "run.safetensors").exists() and process.poll() is None:
            time.sleep(0.02)
        status, (line,) = run(words, capsys)
        alive = process.poll() is None
        process.kill()
    assert status == 2 and alive
    assert line.startswith(f"torch-simu: Another process is working on '{place / 'out'}', expected one at a time.")


@pytest.mark.parametrize("ignored", [False, True])
def test_a_call_leaves_the_handlers_of_signals_as_they_were(
    ignored: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mine(number: int, frame: object) -> None:
        heard.append(number)

    heard: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_IGN if ignored else mine) for number in numbers}
    seen = []
    monkeypatch.setattr(app, "app", lambda *_, **__: seen.extend(signal.getsignal(number) for number in numbers))
    try:
        assert run([], capsys)[0] == 0
        after = [signal.getsignal(number) for number in numbers]
        # Other threads hear no signals, and may not ask for them.
        thread = threading.Thread(target=lambda: run([], capsys))
        thread.start()
        thread.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert after == ([signal.SIG_IGN] * 2 if ignored else [mine] * 2)
    assert [each is signal.SIG_IGN for each in seen[:2]] == [ignored] * 2
    assert seen[2:] == after and heard == []
