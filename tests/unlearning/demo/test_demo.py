"""The demo runs every method and control on the same fiction, and reports the same numbers for the same seed."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.unlearning.test_driver import RECIPE
from torch_simu.cli import app
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.config import METHODS, UnlearnConfig
from torch_simu.unlearning.demo.demo import run_demo

SMALL = dataclasses.replace(
    RECIPE,
    unlearning=UnlearnConfig(
        max_steps=4, attribution_steps=2, max_completeness_error=None, forget_batch_size=6, retain_batch_size=6
    ),
    tuned={method: {"lr": 5e-3} for method in METHODS},
    attack=AttackConfig(rates=(1e-3, 1e-2), steps=4, interval=2),
)
TIMES = ("seconds",)


def figures(result):
    report = result.report.to_json()["methods"]
    return {name: {key: row[key] for key in row if key not in TIMES} for name, row in report.items()}


@pytest.fixture(scope="module")
def demo():
    """The demo on a small recipe."""
    return run_demo(3, recipe=SMALL)


def test_every_method_and_control_is_reported(demo):
    rows = figures(demo)
    assert list(rows) == ["before", *METHODS, "retrained"]
    assert rows["fo_graddiff"]["changed_share"] > 0.9
    assert rows["simu_graddiff"]["changed_share"] == pytest.approx(rows["random_neurons"]["changed_share"], rel=0.1)
    assert rows["simu_graddiff"]["optimizer_bytes"] < 0.2 * rows["so_graddiff"]["optimizer_bytes"]
    assert rows["retrained"]["forget"]["em"] < rows["before"]["forget"]["em"]
    assert "Not reached within 4 steps" in demo.report.notes[-1]


def test_relearning_is_tried_on_every_model_and_brings_back_what_was_known(demo):
    back = {name: row["attack"]["relearn"]["probability"] for name, row in figures(demo).items()}
    assert list(back) == list(figures(demo))
    assert back["before"] > 0.9 and back["retrained"] < 0.5
    page = demo.report.to_markdown()
    assert f"| fo_graddiff | {back['fo_graddiff']:.3f} / " in page
    assert any("`back`" in note for note in demo.report.notes)


def test_a_recipe_without_an_attack_makes_none(tmp_path):
    quiet = dataclasses.replace(SMALL, attack=None)
    result = run_demo(3, recipe=quiet, methods=("fo_graddiff",))
    assert all("attack" not in row for row in figures(result).values())
    assert not any("`back`" in note for note in result.report.notes)
    result.save(tmp_path)
    assert not (tmp_path / "attack.png").exists() and "attack.png" not in (tmp_path / "report.md").read_text()


def test_the_same_seed_gives_the_same_numbers(demo):
    assert figures(run_demo(3, recipe=SMALL)) == figures(demo)


def test_the_command_writes_report_plots_and_logs(tmp_path, monkeypatch, capsys):
    from torch_simu.unlearning.demo import demo as module

    told = []

    def small(seed, *, progress):
        def tell(stage, done, total, note=""):
            told.append(stage)
            progress(stage, done, total, note)

        return run_demo(seed, recipe=SMALL, methods=("simu_graddiff", "fo_graddiff"), progress=tell)

    monkeypatch.setattr(module, "run_demo", small)
    with pytest.raises(SystemExit) as stop:
        app.main(["demo", "--out", str(tmp_path / "out"), "--seed", "1"])
    assert stop.value.code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["seed"] == 1 and set(report["methods"]) == {"before", "simu_graddiff", "fo_graddiff", "retrained"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"report.md", "forgetting.png", "attack.png", "attribution.png", "steps_simu_graddiff.jsonl"}
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith(("before", "simu_graddiff", "fo_graddiff", "retrained"))]
    assert len([line for line in table if "%" in line]) == 4 and max(map(len, table)) <= 80
    assert {
        "train",
        "retrain",
        "simu_graddiff: unlearn",
        "simu_graddiff: attack relearn",
        "train: attack relearn",
    } <= set(told)
