"""`torch-simu recommend` prints what it tried, why, and a command that is typed as it stands and reaches the target."""

from __future__ import annotations

import json
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cli.test_console_blocks import TARGET_MISSED, content, forget_probability, made, place, run  # noqa: F401
from torch_simu.cli.app import main
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.pilot import candidates

SETS = ("--forget", "forget.jsonl", "--retain", "retain.jsonl")
RECOMMEND = ("recommend", "--model", "MODEL_DIR", *SETS)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """One change only: what is tried has tests of its own."""
    monkeypatch.setattr(candidates, "_CHANGES", candidates._CHANGES[:1])


def printed(capsys) -> tuple[str, list[str]]:
    """All that was printed, and the words of the command at its end."""
    text = capsys.readouterr().out
    return text, shlex.split(text.splitlines()[-1])


@pytest.mark.filterwarnings("ignore::UserWarning:transformers.quantizers")
@pytest.mark.parametrize("load_in", [None, "8bit"])
def test_the_printed_command_runs_on_the_same_files_and_reaches_the_target(load_in, place, capsys, monkeypatch):  # noqa: F811
    if load_in is not None:
        pytest.importorskip("bitsandbytes")
    before = content("MODEL_DIR")
    files = {path for path in Path().rglob("*")}
    loaded = () if load_in is None else ("--load-in", load_in)
    # A terminal that is narrower than the command.
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*RECOMMEND, "--out", "my out", "--forget-target", 0.4, "--seed", 3, *loaded) == 0
    assert content("MODEL_DIR") == before and {path for path in Path().rglob("*")} == files
    text, words = printed(capsys)
    said = " ".join(text.split())
    assert "as given" in said and "--retain-term kl" in said and "the best" in said
    assert "reaches a mean forget probability of" in said and "(target 0.4)" in said
    assert max(map(len, text.splitlines()[:-1])) <= 80
    assert words[:2] == ["torch-simu", "unlearn"]
    assert run(*words[1:]) == 0
    assert forget_probability("my out/report.json", "simu") <= 0.41
    report = json.loads(Path("my out/report.json").read_text())
    assert report["settings"]["seed"] == 3 and report["settings"]["forget_target"] == 0.4
    assert Path("my out/deltas.safetensors").is_file() is (load_in is not None)


def test_a_pilot_that_reaches_no_target_says_so_and_ends_with_status_3(place, capsys):  # noqa: F811
    assert run(*RECOMMEND, "--minutes", 1e-6) == TARGET_MISSED
    text, words = printed(capsys)
    assert "No try reached the target of 0.1" in " ".join(text.split())
    assert (
        words == shlex.split(f"torch-simu unlearn --model MODEL_DIR {shlex.join(SETS)} --out OUT_DIR")
        and "--max-steps" not in words
    )


def test_the_command_has_what_the_pilot_was_given(place, capsys):  # noqa: F811
    given = (
        "--max-length",
        40,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--batch-size",
        5,
        "--method",
        "simu_graddiff",
    )
    assert run(*RECOMMEND, "--minutes", 1e-6, *given) == TARGET_MISSED
    _, words = printed(capsys)
    pairs = dict(pairwise(words))
    assert [pairs[name] for name in given[::2]] == list(map(str, given[1::2]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--minutes", 0), "minutes is 0.0, expected a finite number in (0, inf)"),
        (("--minutes", "soon"), "'--minutes'"),
        (("--forget-target", 2), "forget_target is 2.0"),
        (("--forget-target", 1), "before anything is forgotten, expected more than the target of 1.0. Lower"),
        (("--method", "simo"), "method is 'simo'"),
        (("--load-in", "8bit", "--method", "fo_graddiff"), "trains whole weights, and load_in is '8bit'"),
        (("--retain", "forget.jsonl"), "forget"),
        (("--retain", "nothing.jsonl"), "nothing.jsonl"),
        (("--model", "./nothing"), "Model folder './nothing' does not exist"),
    ],
)
def test_what_is_wrong_is_one_line_with_status_2(words, message, place, capsys):  # noqa: F811
    assert run(*RECOMMEND, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("torch-simu: ") and error.count("\n") == 1 and message in error


def test_minutes_are_checked_before_anything_is_read(capsys):
    with pytest.raises(SystemExit):
        main([*RECOMMEND, "--minutes", "-1"])
    assert "minutes is -1.0" in capsys.readouterr().err


def test_without_options_a_pilot_starts_from_the_defaults_of_unlearn(monkeypatch, capsys):
    from torch_simu.cli.commands import recommend as command

    found = []

    def job(model, sets, config, **_):
        found.append(config)
        raise ValueError("stopped")

    monkeypatch.setattr(command, "recommend_job", job)
    with pytest.raises(SystemExit):
        main(list(RECOMMEND))
    sizes = {f"{name}_batch_size": 16 for name in ("forget", "retain", "hessian", "eval")}
    assert found == [UnlearnConfig(**sizes)]
