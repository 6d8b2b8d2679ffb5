"""A suite is named in one place, from which the command line takes its name, its work and its headlines."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from torch_simu.cli import jobs, measuring
from torch_simu.cli.loading import Loading
from torch_simu.cli.measuring import Measuring
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


def test_a_suite_that_is_entered_is_run_on_the_reference_first_and_then_on_the_model(monkeypatch, tmp_path):
    calls = []

    def measure(model, tokenizer, sets, *, reference, batch_size, max_new_tokens, progress):
        calls.append((model, sorted(sets), reference, batch_size, max_new_tokens))
        return {"score": float(len(calls))}

    new = Suite(measure, ("score",), max_new_tokens=7)
    monkeypatch.setattr(jobs, "SUITES", MappingProxyType({**SUITES, "new": new}))
    monkeypatch.setattr(Loading, "load", lambda self, source: (source, None))
    monkeypatch.setattr(measuring, "evaluate", lambda *args, **options: Measured)
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"question": "{name}?", "answer": "a"}}\n')
    sets = {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")}
    report, figures = jobs.evaluate_job(
        "m", sets, reference="r", suite="new", measuring=Measuring(3), progress=lambda *told: None
    )
    assert calls == [
        ("r", ["forget", "retain"], None, 3, 7),
        ("m", ["forget", "retain"], {"score": 1.0}, 3, 7),
    ]
    assert figures == {"score": 2.0} and list(report.methods) == ["reference", "model"]


class Measured:
    """What evaluate returns, as far as it is read."""

    means = MappingProxyType({"em": 1.0})
