"""The demo runs every method and control on the same fiction, and reports the same numbers for the same seed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import pytest

from tests.unlearning.demo.tiny import TINY, tiny_command
from tests.unlearning.test_driver import RECIPE
from torch_simu.cli import app
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.config import METHODS, UnlearnConfig
from torch_simu.unlearning.demo.demo import run_demo
from torch_simu.unlearning.demo.plan import DemoPlan, about

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
    quiet = dataclasses.replace(TINY, attack=None)
    result = run_demo(3, recipe=quiet, methods=("fo_graddiff",))
    assert all("attack" not in row for row in figures(result).values())
    assert not any("`back`" in note for note in result.report.notes)
    result.save(tmp_path)
    assert not (tmp_path / "attack.png").exists() and "attack.png" not in (tmp_path / "report.md").read_text()


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    first, again, other = (figures(run_demo(seed, recipe=TINY)) for seed in (3, 3, 4))
    assert first == again != other


def test_the_command_says_what_it_does_and_writes_report_plots_and_logs(tmp_path, capsys):
    with tiny_command(("simu_graddiff", "fo_graddiff")), pytest.raises(SystemExit) as stop:
        app.main(["demo", "--out", str(tmp_path / "out"), "--seed", "1"])
    assert stop.value.code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["seed"] == 1 and set(report["methods"]) == {"before", "simu_graddiff", "fo_graddiff", "retrained"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"report.md", "forgetting.png", "attack.png", "attribution.png", "steps_simu_graddiff.jsonl"}
    shown, told = capsys.readouterr()
    lines = shown.splitlines()
    table = [line for line in lines if line.startswith(("before", "simu_graddiff", "fo_graddiff", "retrained"))]
    assert len([line for line in table if "%" in line]) == 4 and max(map(len, table)) <= 80
    # At once what is done, for how long, and where it goes; a line when a stage is complete.
    said = " ".join(shown.split())
    assert said.startswith(
        "A small Llama learns 4 facts by heart about each of 3 fictional people to forget, 3 others and"
    )
    assert "each method makes a copy of it forget the 12 facts about the first" in said
    assert "at most 0: simu_graddiff, fo_graddiff. One more model never learns them." in said
    assert "That takes less than a minute here. Report and plots will be in" in said
    assert "/out.run/results.json,andthesamecommandgoesonfromthereifitisstopped." in said.replace(" ", "")
    stages = ["train", "attack relearn", "measure"]
    expected = [f"before: {stage}" for stage in stages]
    expected += [f"simu_graddiff: attribute {each}" for each in ("forget", "retain")]
    for method in ("simu_graddiff", "fo_graddiff"):
        expected += [f"{method}: {stage}" for stage in ("unlearn", "measure", "attack relearn")]
    expected += [*(f"retrained: {stage}" for stage in stages), "report"]
    assert [re.fullmatch(r"(.+): (\d+) of \2(, .+)?", line)[1] for line in told.splitlines()] == expected
    assert re.search(r"^before: train: 9 of 9, EM 0\.\d{3}, target 1$", told, re.MULTILINE)
    assert re.search(r"^fo_graddiff: unlearn: 2 of 2, forget prob\. 0\.\d{3} \(target 0\)$", told, re.MULTILINE)
    assert re.search(r"^fo_graddiff: attack relearn: 2 of 2, back to prob\. 0\.\d{3}$", told, re.MULTILINE)


def test_a_plan_is_the_less_the_more_is_finished_and_corrected_by_the_time_it_took():
    plan = DemoPlan.make(SMALL)
    names = list(plan.costs)
    assert names == ["before", *METHODS, "retrained"] and plan.seconds_per_row > 0
    left = [plan.seconds(names[:count]) for count in range(len(names) + 1)]
    assert left[0] > 0 and left[-1] == 0 and all(more > less for more, less in itertools.pairwise(left))
    # Twice as slow as was expected of the first three, the first of which was finished before.
    took = 2 * (left[1] - left[3])
    assert plan.left(names[:3], names[:1], took) == pytest.approx(2 * left[3])
    assert plan.left(names[:1], names[:1], 5.0) == left[1]


def test_the_costs_of_a_plan_are_in_proportion_to_the_work():
    def costs(**changes):
        return DemoPlan.make(dataclasses.replace(SMALL, **changes)).costs

    usual = costs(attack=None)
    longer = costs(attack=None, unlearning=SMALL.unlearning.updated(max_steps=40))
    assert longer["before"] == usual["before"] and longer["fo_graddiff"] > 3 * usual["fo_graddiff"]
    assert usual["retrained"] < usual["before"] and usual["simu"] > usual["fo_graddiff"]
    assert all(costs()[name] > usual[name] for name in usual)


def test_what_is_said_of_a_demo_without_attack_and_target_names_neither():
    quiet = dataclasses.replace(SMALL, attack=None, unlearning=SMALL.unlearning.updated(forget_target=None))
    said = about(quiet, ("simu",))
    assert said.endswith("forget the 16 facts about the first: simu. One more model never learns them.")
