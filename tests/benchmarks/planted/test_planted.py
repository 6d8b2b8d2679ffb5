"""Facts planted in known columns are there and nowhere else, and exact attribution finds those columns."""

from __future__ import annotations

import copy
from statistics import mean

import pytest
import torch

from benchmarks.planted import budgets
from benchmarks.planted.column_scores import auc
from benchmarks.planted.erasing import zeroed
from benchmarks.planted.planted import found_mask, masks_of, over_seeds, precision, ranked, scored
from benchmarks.planted.planting import PlantingRecipe, check_planted, knowledge, norm_ratio, plant
from torch_simu import attribute_neurons
from torch_simu.layers import select_layers
from torch_simu.unlearning.data.batches import batches_in_order
from torch_simu.unlearning.demo.memorize import TrainConfig

SMALL = PlantingRecipe(
    num_forget=6,
    retain_per_forget=5,
    num_places=6,
    d_model=96,
    d_ff=384,
    num_layers=3,
    share=0.35,
    training=TrainConfig(epochs=60, lr=3e-3),
    lr=4e-3,
    max_steps=100,
)


@pytest.fixture(scope="module")
def planted():
    """A small model with planted facts."""
    return plant(SMALL, 0)


@pytest.fixture(scope="module")
def found(planted):
    """All scores of all methods on it."""
    return scored(planted, 0, steps=5)


def mean_auc(scores, selection):
    return mean(auc(score, selection.mask(name)) for name, score in scores.items())


def test_only_planted_columns_changed_and_none_of_them_grew(planted):
    after = planted.model.state_dict()
    for name, weight in planted.base.state_dict().items():
        layer = name.removesuffix(".weight")
        moved = (after[name] != weight).reshape(-1, weight.shape[-1]).any(dim=0)
        if layer not in planted.selection:
            assert not moved.any()
            continue
        assert not moved[~planted.selection.mask(layer)].any()
        assert moved[planted.selection.mask(layer)].float().mean() > 0.9
        torch.testing.assert_close(after[name].norm(dim=0), weight.norm(dim=0), rtol=1e-4, atol=0.0)
    assert norm_ratio(planted.model, planted.selection) == pytest.approx(1.0, abs=0.05)


def test_the_facts_are_memorized_by_planting_and_the_rest_is_kept(planted):
    assert knowledge(planted.model, planted.sets["forget"])["em"] == 1.0
    assert knowledge(planted.base, planted.sets["forget"])["es"] < 0.3
    assert knowledge(planted.model, [*planted.sets["retain"], *planted.sets["world"]])["em"] >= 0.99


@pytest.mark.parametrize("columns", ["planted", "unplanted"])
def test_a_planting_that_leaked_or_grew_is_refused(planted, columns):
    leaky = copy.deepcopy(planted)
    layer, module = next(iter(select_layers(leaky.model, leaky.selection).items()))
    mask = leaky.selection.mask(layer)
    with torch.no_grad():
        module.weight[:, mask if columns == "planted" else ~mask] *= 1.01
    with pytest.raises(AssertionError, match="not planted" if columns == "unplanted" else "not close"):
        check_planted(leaky)


def test_exact_attribution_finds_the_planted_columns(planted, found):
    scores = ranked(found["exact", "prob"], "contrast")
    assert mean_auc(scores, planted.selection) > 0.8
    assert (
        mean_auc(scores, planted.selection) > mean_auc(ranked(found["random", "none"], "raw"), planted.selection) + 0.2
    )
    assert precision(found_mask(scores, planted.selection), planted.selection) > 1.5 * planted.selection.fraction


def test_scores_of_the_wrong_columns_do_not(planted, found):
    scores = ranked(found["exact", "prob"], "contrast")
    rolled = {name: score.roll(1) for name, score in scores.items()}
    draw = torch.Generator().manual_seed(0)
    shuffled = {name: score[torch.randperm(len(score), generator=draw)] for name, score in scores.items()}
    for wrong in (rolled, shuffled):
        assert 0.35 < mean_auc(wrong, planted.selection) < 0.65
    assert mean_auc({name: -score for name, score in scores.items()}, planted.selection) < 0.2


def test_the_contrast_of_fact_by_fact_scores_is_that_of_the_library(planted, found):
    forget = planted.sets["forget"]
    parts = (forget, planted.sets["retain"][: len(forget)])
    options = {"objective": "prob", "steps": 5, "method": "packed", "max_completeness_error": None}
    mine, theirs = (attribute_neurons(planted.model, batches_in_order(part, 8), **options) for part in parts)
    ours = ranked(found["exact", "prob"], "contrast")
    for name, score in mine.contrast(theirs).scores.items():
        torch.testing.assert_close(ours[name], score, rtol=1e-3, atol=1e-4)


def test_without_the_planted_columns_the_facts_are_gone(planted, found):
    masks = masks_of(planted, found, 0)
    sizes = {name: mask.num_selected for name, mask in masks.items()}
    assert set(sizes.values()) == {planted.selection.num_selected}
    assert not (masks["unplanted"] & planted.selection).num_selected
    left = {name: knowledge(zeroed(planted.model, mask), planted.sets["forget"])["em"] for name, mask in masks.items()}
    assert left["true"] < 0.7 and left["exact"] < 0.7 < left["unplanted"]


def test_ties_count_half_and_seeds_are_averaged():
    assert auc(torch.zeros(4), torch.tensor([True, False, False, True])) == 0.5
    rows = [{"kind": "erase", "mask": "true", "seed": seed, "forget": {"em": seed}} for seed in (0, 2)]
    [entry] = over_seeds(rows, "erase", ("mask",))
    assert entry == {"kind": "erase", "mask": "true", "forget_em": {"mean": 1.0, "std": pytest.approx(2**0.5)}}


def test_a_halved_row_scores_half_of_its_tokens_and_each_way_names_what_its_passes_are(planted):
    forget = planted.sets["forget"]
    for halved in (budgets.half_of(forget, rarest=rarest) for rarest in (True, False)):
        counts = [(before.num_scored, after.num_scored) for before, after in zip(forget, halved, strict=True)]
        assert all(after == (before + 1) // 2 for before, after in counts)
    passes = {way: budgets.passes_of(options, 4) for way, options in budgets.WAYS.items()}
    assert passes["one midpoint"] == 3 < passes["gauss 2"] == 7.5 < passes["midpoint 10"] == 27.5


def test_quality_is_measured_against_many_points_and_rises_with_them(planted):
    ways = {name: budgets.WAYS[name] for name in ("budget 2", "gauss 3")}
    sets = {name: planted.sets[name] for name in ("forget", "retain")}
    rows = list(budgets.measured("planted", 0, planted.model, sets, 0, planted.selection, ways=ways))
    few, many = rows
    assert few["layer"] < many["layer"] <= 1.0 and few["passes"] < many["passes"]
    assert all(0.5 < row["auc"] <= 1 for row in rows)
