"""Groups planted in neurons of their own are there and nowhere else, and masks are held to that."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from benchmarks.planted import group_masks
from benchmarks.planted.erasing import zeroed
from benchmarks.planted.groups import (
    KNOWN_BEFORE,
    GroupsRecipe,
    check_groups,
    grouped,
    person,
    plant_groups,
    silent,
    weights_of,
    without_columns,
)
from benchmarks.planted.planting import PlantingRecipe, knowledge, make_rows
from benchmarks.verdicts.claims import CLAIMS
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.demo.memorize import TrainConfig

SMALL = GroupsRecipe(
    planting=PlantingRecipe(
        num_forget=4,
        retain_per_forget=2,
        num_places=4,
        d_model=64,
        d_ff=256,
        num_layers=2,
        share=0.1,
        training=TrainConfig(epochs=60, lr=4e-3, batch_size=16),
        batch_size=8,
        max_steps=120,
    ),
    num_groups=2,
    distill_steps=30,
)


@pytest.fixture(scope="module")
def groups():
    """Two groups of two people in a tiny model."""
    return plant_groups(SMALL, 0)


def test_every_group_is_known_and_its_people_are_in_no_other(groups):
    rows = grouped(make_rows(SMALL.planting, 0), 2)
    people = {name: {person(row) for row in part} for name, part in rows.items() if name not in KNOWN_BEFORE}
    assert people["group 1"].isdisjoint(people["group 2"]) and len(people["group 1"]) == 2
    for name, facts in groups.sets.items():
        assert knowledge(groups.model, facts)["em"] >= 0.98
        if name in groups.columns:
            assert len(facts) == 8 and knowledge(groups.base, facts)["es"] < 0.35
    assert groups.told["divergence"] < groups.told["divergence_taught"]


def test_without_its_columns_a_group_is_lost_and_the_others_are_not(groups):
    for group, em in without_columns(groups).items():
        assert em[group] < 0.75
        assert min(value for name, value in em.items() if name != group) > em[group] + 0.1


@pytest.mark.parametrize("leak", ["another neuron", "a shared neuron"])
def test_a_planting_that_leaked_is_refused(groups, leak):
    leaky = dataclasses.replace(groups, model=copy.deepcopy(groups.model))
    (name, (weight, where)) = next(iter(weights_of(leaky.model, groups.columns["group 1"]).items()))
    if leak == "another neuron":
        planted = weights_of(leaky.model, groups.columns["group 2"])[name][1] | where
        with torch.no_grad():
            weight += (~planted).float()
        expected = f"{name} changed beside"
    else:
        columns = groups.columns["group 1"]
        leaky = dataclasses.replace(leaky, columns={**groups.columns, "group 2": columns | groups.columns["group 2"]})
        expected = "neurons are shared"
    with pytest.raises(AssertionError, match=expected):
        check_groups(leaky)


def test_neurons_are_silent_while_asked_and_no_longer(groups):
    facts = groups.sets["group 1"]
    with silent(groups.model, groups.columns["group 1"]):
        quiet = knowledge(groups.model, facts)
    assert quiet == knowledge(zeroed(groups.model, groups.columns["group 1"]), facts)
    assert knowledge(groups.model, facts)["em"] >= 0.98


def test_masks_are_scored_and_erase_within_one_budget(groups, monkeypatch):
    monkeypatch.setattr(group_masks, "FOUND_BY", ("midpoint 10", "gradient x activation"))
    monkeypatch.setattr(group_masks, "ATTACK", AttackConfig(rates=(1e-3,), steps=4, interval=4, batch_size=8))
    masks = group_masks.masks_of(groups, 0)
    own = groups.columns["group 1"]
    assert masks["own"] == own and not (masks["another group's"] & own).num_selected
    assert (masks["random"] & own).num_selected < own.num_selected / 2
    assert {mask.num_selected for name, mask in masks.items() if name != "all"} == {own.num_selected}
    config = group_masks.ERASING.updated(max_steps=3)
    rows = [
        {"seed": 0, **row}
        for part in (group_masks.planting_rows(groups), group_masks.score_rows(groups))
        for row in part
    ]
    rows += [{"seed": 0, **row} for row in group_masks.erase_rows(groups, 0, config)]
    erased = {row["mask"]: row for row in rows if row["kind"] == "erase"}
    assert erased["own"]["precision"] == 1.0 and erased["another group's"]["precision"] == 0.0
    assert all(row["steps"] <= 3 for row in erased.values() if "steps" in row)
    assert erased["never knew"]["sets"]["group 1"]["probability"] < erased["before"]["sets"]["group 1"]["probability"]
    found = {(row["way"], row["rule"]): row for row in rows if row["kind"] == "scores" and row["group"] == "group 1"}
    assert found["midpoint 10", "contrast"]["auc"] > 0.8
    parts = CLAIMS["planted_groups"].verdict({"rows": rows})["parts"]
    measured = [part["measured"] for part in parts[:5]]
    assert None not in measured
    for table in (group_masks.scores_table, group_masks.without_table, group_masks.erased_table):
        lines = list(table(rows))
        assert len({line.count("|") for line in lines}) == 1 and len(lines) > 3


def test_a_mask_that_missed_the_target_compares_with_nothing():
    sets = {name: {"probability": 0.9} for name in ("group 1", "group 2", "retain", "world")}
    rows = [
        {
            "kind": "erase",
            "seed": seed,
            "mask": mask,
            "reached": mask != "random",
            "sets": sets,
            "back": {"probability": 0.2},
        }
        for seed in range(3)
        for mask in ("own", "random", "another group's", "found by ten midpoints")
    ]
    parts = {part["claim"]: part["holds"] for part in CLAIMS["planted_groups"].verdict({"rows": rows})["parts"]}
    assert {holds for claim, holds in parts.items() if "beside random" in claim} == {"not measured"}
    assert parts["relearned, own columns beside another group's: upper end of the difference"] is True
    assert parts["kept, own columns beside another group's: lower end of the difference"] is False
