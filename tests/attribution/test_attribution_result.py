"""From scores to selections: thresholds, fractions, scopes, contrast; and files that give the same scores back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import normal, seeds
from torch_simu import _files
from torch_simu.attribution import Attribution
from torch_simu.attribution.path import Path as AttributionPath
from torch_simu.attribution.path import objective_values


def attribution(**scores: list[float]) -> Attribution:
    tensors = {layer: torch.tensor(values, dtype=torch.float64) for layer, values in scores.items()}
    return Attribution(tensors, dict.fromkeys(scores, 0.25), 3, {"objective": "logprob"})


def drawn(seed: int) -> Attribution:
    scores = {layer: normal(seed + index, 5 + index, dtype=torch.float64) for index, layer in enumerate("ba")}
    return Attribution(scores, {"b": 0.5, "a": -1.0}, 7, {"steps": 10})


@given(seeds, st.floats(0.01, 0.99), st.sampled_from(["layer", "global"]))
def test_select_takes_scores_above_the_share_of_the_largest(seed: int, threshold: float, scope: str) -> None:
    found = drawn(seed)
    largest = max(scores.max().item() for scores in found.scores.values())
    for scores in found.scores.values():
        scores[0] = largest + scores[0].abs()
    largest = max(scores.max().item() for scores in found.scores.values())
    selection = found.select(threshold, scope)
    for layer, scores in found.scores.items():
        bound = threshold * (scores.max().item() if scope == "layer" else largest)
        assert selection[layer].tolist() == [index for index, score in enumerate(scores.tolist()) if score > bound]


def test_a_layer_without_a_positive_score_selects_nothing_and_warns() -> None:
    with pytest.warns(UserWarning, match=r"largest score of layer 'a' \(1 such\) is -1.*No neuron is selected"):
        selection = attribution(a=[-1.0, -3.0], b=[1.0, 0.1]).select()
    assert selection["a"].tolist() == []
    assert selection["b"].tolist() == [0]
    with pytest.warns(UserWarning, match=r"largest score of layer 'a' \(2 such\) is 0"):
        assert attribution(a=[0.0, 0.0], b=[-1.0]).select(scope="global").num_selected == 0


def test_global_scope_is_quiet_about_layers_that_lose_against_others() -> None:
    selection = attribution(a=[-1.0, -3.0], b=[1.0, 0.5]).select(0.3, "global")
    assert (selection["a"].tolist(), selection["b"].tolist()) == ([], [0, 1])


@pytest.mark.parametrize("threshold", [0, 1, -0.5, 1.5, float("nan")])
def test_a_threshold_outside_the_open_unit_interval_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold is .*, expected a finite number in \(0, 1\)"):
        attribution(a=[1.0]).select(threshold)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_raise(value: float) -> None:
    broken = attribution(a=[1.0, 2.0], b=[1.0, value])
    fine = attribution(a=[1.0, 2.0], b=[1.0, 1.0])
    message = "1 of 2 scores of layer 'b' are not finite"
    for call in (broken.select, lambda: broken.top(0.5), lambda: broken.contrast(fine), lambda: fine.contrast(broken)):
        with pytest.raises(ValueError, match=message):
            call()


def test_an_unknown_scope_is_refused() -> None:
    for call in (lambda: attribution(a=[1.0]).select(scope="all"), lambda: attribution(a=[1.0]).top(0.5, scope="all")):
        with pytest.raises(ValueError, match="scope is 'all'"):
            call()


@given(seeds, st.floats(0, 1))
def test_top_takes_the_highest_scores_of_each_layer(seed: int, fraction: float) -> None:
    found = drawn(seed)
    selection = found.top(fraction)
    for layer, scores in found.scores.items():
        count = round(fraction * len(scores))
        assert selection[layer].tolist() == sorted(scores.argsort(descending=True)[:count].tolist())


@given(seeds, st.floats(0, 1))
def test_top_in_global_scope_takes_the_highest_scores_of_all_layers(seed: int, fraction: float) -> None:
    found = drawn(seed)
    ranked = sorted((-score, layer, i) for layer, each in found.scores.items() for i, score in enumerate(each.tolist()))
    expected = {(layer, i) for _, layer, i in ranked[: round(fraction * len(ranked))]}
    selection = found.top(fraction, "global")
    assert {(layer, i) for layer in selection for i in selection[layer].tolist()} == expected


def test_top_prefers_the_lower_index_among_equals() -> None:
    assert attribution(a=[1.0, 1.0, 1.0, 1.0]).top(0.5)["a"].tolist() == [0, 1]


def test_a_fraction_outside_the_unit_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fraction is 1\.5"):
        attribution(a=[1.0]).top(1.5)


@given(seeds, st.floats(0.1, 10))
def test_contrast_compares_shapes_not_sizes(seed: int, factor: float) -> None:
    found = drawn(seed)
    scaled = Attribution({layer: factor * scores for layer, scores in found.scores.items()}, {}, 1, {})
    for scores in found.contrast(scaled).scores.values():
        torch.testing.assert_close(scores, torch.zeros_like(scores))


def test_contrast_keeps_the_origin_of_both_and_leaves_silent_layers_at_zero() -> None:
    contrast = attribution(a=[0.0, 0.0]).contrast(attribution(a=[1.0, 3.0]))
    assert contrast.scores["a"].tolist() == [-0.5, -1.5]
    assert contrast.provenance == {"contrast": [{"objective": "logprob"}, {"objective": "logprob"}]}
    assert (contrast.num_samples, dict(contrast.completeness_error)) == (3, {})


def test_contrast_refuses_other_layers() -> None:
    with pytest.raises(ValueError, match=r"The layers differ in \{'a': 2, 'b': 1\}"):
        attribution(a=[1.0, 2.0]).contrast(attribution(b=[1.0]))


def test_a_saved_attribution_loads_equal(tmp_path: Path) -> None:
    found, path = drawn(1), tmp_path / "scores.safetensors"
    found.save(path)
    loaded = Attribution.load(path)
    assert list(loaded.scores) == ["b", "a"]
    assert all(torch.equal(loaded.scores[layer], scores) for layer, scores in found.scores.items())
    assert loaded.completeness_error == found.completeness_error
    assert (loaded.num_samples, loaded.provenance) == (7, {"steps": 10})


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    _files.save_tensors(path, "NeuronSelection", {}, {})
    with pytest.raises(
        ValueError, match=r"has kind 'NeuronSelection'.*expected a torch_simu file of kind 'Attribution'"
    ):
        Attribution.load(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Attribution.load(tmp_path / "missing.safetensors")


def test_objectives_are_log_likelihood_probability_and_loss() -> None:
    logits, targets = normal(3, 2, 4, 5), torch.tensor([0, 1, 2, 3])
    logprob = objective_values(logits, targets, "logprob")
    torch.testing.assert_close(logprob, logits.log_softmax(-1)[:, torch.arange(4), targets])
    torch.testing.assert_close(objective_values(logits, targets, "prob"), logprob.exp())
    assert torch.equal(objective_values(logits, targets, "loss"), -logprob)
    assert objective_values(logits.bfloat16(), targets, "logprob").dtype == torch.float32


def test_path_points_follow_the_rule() -> None:
    assert AttributionPath(rule="midpoint", steps=2).alphas == [0.25, 0.75]
    assert AttributionPath(rule="right", steps=2).alphas == [0.5, 1.0]
    assert AttributionPath(rule="left", steps=2).alphas == [0.0, 0.5]


@given(st.integers(1, 40), seeds)
def test_gauss_points_integrate_polynomials_up_to_twice_their_number_less_one(steps: int, seed: int) -> None:
    path = AttributionPath(rule="gauss", steps=steps)
    assert path.alphas == sorted(path.alphas)
    coefficients = normal(seed, 2 * steps, dtype=torch.float64)
    points, weights = (torch.tensor(each, dtype=torch.float64) for each in (path.alphas, path.weights))
    found = weights @ (points[:, None] ** torch.arange(2 * steps) @ coefficients) / steps
    expected = (coefficients / torch.arange(1, 2 * steps + 1)).sum()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # Of one degree more the rule misses what the theorem on its error says.
    missed = 1 / (2 * steps + 1) - weights @ points ** (2 * steps) / steps
    theorem = math.factorial(steps) ** 4 / ((2 * steps + 1) * math.factorial(2 * steps) ** 2)
    assert missed.item() == pytest.approx(theorem, rel=1e-6, abs=1e-12)


@given(st.sampled_from(["midpoint", "right", "left"]), st.integers(1, 20))
def test_points_of_equal_parts_count_alike(rule: str, steps: int) -> None:
    assert AttributionPath(rule=rule, steps=steps).weights == [1.0] * steps


@given(seeds, st.floats(0.05, 0.95), st.sampled_from(["layer", "global"]), st.sampled_from(["select", "top"]))
def test_dual_neurons_are_kept_dropped_or_isolated(seed: int, amount: float, scope: str, rule: str) -> None:
    forget, retain = drawn(seed), drawn(seed + 10)
    for each in (forget, retain):
        for scores in each.scores.values():
            scores[0] = scores.abs().max() + 1
    mine, theirs = (getattr(each, rule)(amount, scope) for each in (forget, retain))
    found = {
        dual: getattr(forget, rule)(amount, scope, retain=retain, dual=dual) for dual in ("keep", "drop", "isolate")
    }
    for layer in forget.scores:
        critical, also = set(mine[layer].tolist()), set(theirs[layer].tolist())
        assert set(found["keep"][layer].tolist()) == critical
        assert set(found["drop"][layer].tolist()) == critical - also
        assert set(found["isolate"][layer].tolist()) == critical & also


def test_an_unknown_way_with_dual_neurons_and_other_layers_are_refused() -> None:
    one = attribution(a=[1.0, 2.0])
    with pytest.raises(ValueError, match="dual is 'dropped', expected one of 'keep', 'drop', 'isolate'"):
        one.top(0.5, retain=one, dual="dropped")
    for call in (lambda: one.select(retain="scores"), lambda: one.contrast(None), lambda: one.stability([1.0])):
        with pytest.raises(TypeError, match="The other scores are of type .*, expected an Attribution"):
            call()
    for call in (lambda: one.select(retain=attribution(b=[1.0])), lambda: one + attribution(a=[1.0]),
                 lambda: one.stability(attribution(b=[1.0]))):  # fmt: skip
        with pytest.raises(ValueError, match="The layers differ in"):
            call()


@given(seeds, seeds, st.sampled_from(["layer", "global"]), st.sampled_from([0.2, 0.5, 1.0]))
def test_stability_is_the_share_of_top_neurons_in_both(one: int, two: int, scope: str, fraction: float) -> None:
    first, second = drawn(one), drawn(two)
    pairs = [
        {(layer, int(index)) for layer, indices in each.top(fraction, scope).items() for index in indices}
        for each in (first, second)
    ]
    assert first.stability(second, fraction, scope) == pytest.approx(len(pairs[0] & pairs[1]) / len(pairs[0]))
    assert first.stability(first, fraction, scope) == 1.0


def test_stability_of_no_neuron_is_refused() -> None:
    one = attribution(a=[1.0, 2.0])
    with pytest.raises(ValueError, match="fraction 0.1 selects no neuron, expected at least one"):
        one.stability(one, 0.1)


def test_a_sum_counts_the_samples_of_both() -> None:
    total = attribution(a=[1.0, 2.0]) + attribution(a=[3.0, -2.0])
    assert total.scores["a"].tolist() == [4.0, 0.0]
    assert (total.num_samples, total.completeness_error["a"]) == (6, 0.5)
    assert total.provenance == {"sum": [{"objective": "logprob"}] * 2}
    with pytest.raises(TypeError):
        attribution(a=[1.0]) + 1


def test_the_old_name_of_the_completeness_error_still_reads(tmp_path: Path) -> None:
    found, path = drawn(1), tmp_path / "scores.safetensors"
    assert found.delta is found.completeness_error
    header = {"layers": list(found.scores), "delta": dict(found.delta), "num_samples": 7, "provenance": {}}
    _files.save_tensors(path, "Attribution", found.scores, header)
    assert Attribution.load(path).completeness_error == found.completeness_error
