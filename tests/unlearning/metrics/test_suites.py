"""A suite is named in one place, from which the command line takes its name, its work and its headlines."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.language import ROWS, tiny_model, word_tokenizer
from torch_simu.cli import jobs
from torch_simu.cli.app import main
from torch_simu.unlearning.metrics.suites import SUITES, Suite


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        ({"score": 0.5, "other": 1.0}, {"score": 0.5}),
        ({"score": {"geometric": 0.5, "arithmetic": 0.25}}, {"score (geometric)": 0.5, "score (arithmetic)": 0.25}),
        ({"score": None}, {}),
        ({}, {}),
    ],
)
def test_the_headlines_are_the_named_figures_that_were_measured(figures, shown):
    assert Suite(lambda *args, **options: figures, ("score",)).shown(figures) == shown


def test_a_suite_that_is_entered_is_run_on_the_reference_first_and_then_on_the_model(monkeypatch, tmp_path, capsys):
    calls = []

    def measure(model, tokenizer, sets, *, reference, batch_size, max_new_tokens, progress):
        calls.append((Path(model.name_or_path).name, sorted(sets), reference, batch_size, max_new_tokens))
        return {"score": float(len(calls))}

    monkeypatch.setattr(jobs, "SUITES", MappingProxyType({**SUITES, "new": Suite(measure, ("score",), (), 7)}))
    tokenizer = word_tokenizer()
    for name in ("model", "reference"):
        tiny_model(tokenizer).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, row in (("forget", ROWS[0]), ("retain", ROWS[1])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": row.question, "answer": row.answer}))
    words = [part for name in ("model", "reference") for part in (f"--{name}", str(tmp_path / name))]
    words += [part for name in ("forget", "retain") for part in (f"--{name}", str(tmp_path / f"{name}.jsonl"))]
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *words, "--suite", "new", "--batch-size", "3"])
    assert stopped.value.code == 0
    assert calls == [
        ("reference", ["forget", "retain"], None, 3, 7),
        ("model", ["forget", "retain"], {"score": 1.0}, 3, 7),
    ]
    assert "score: 2" in capsys.readouterr().out
