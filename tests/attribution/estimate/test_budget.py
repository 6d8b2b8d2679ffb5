"""Within a budget scores are exact where that fits, else the estimate that the definition of its passes gives."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.attribution.reference_attribution import (
    _last_activation,
    _value,
    lively,
    loosely,
    padded_batch,
    sequences,
)
from tests.attribution.test_attribution import relative_error
from tests.strategies import seeds
from torch_simu.attribution import Attribution, attribute_neurons
from torch_simu.attribution.attribute import _ROWS
from torch_simu.attribution.estimate.design import Design
from torch_simu.attribution.estimate.passes import Passes
from torch_simu.attribution.frozen import frozen
from torch_simu.attribution.methods.memory import Memory
from torch_simu.attribution.methods.sums import LayerSum
from torch_simu.attribution.path import Objective
from torch_simu.attribution.path import Path as AttributionPath
from torch_simu.attribution.sequences import collect_sequences
from torch_simu.layers import down_projections

Sample = tuple[Tensor, Tensor]
"""A prefix and the token after it."""


def samples_of(rows: list[tuple[Tensor, Tensor]]) -> list[Sample]:
    """All samples, those of the shortest rows first."""
    ordered = sorted(rows, key=lambda row: int((row[1] != -100).nonzero().max()))
    return [(ids[:t], labels[t]) for ids, labels in ordered for t in range(1, len(ids)) if labels[t] != -100]


def together(samples: list[Sample], method: str) -> list[list[Sample]]:
    """The samples that share a design: all, or those with a prefix of one length."""
    lengths = sorted({len(prefix) for prefix, _ in samples})
    same = [[each for each in samples if len(each[0]) == length] for length in lengths]
    return same if method == "prefix" else [samples]


def gradient_times_activation(model: nn.Module, layer: str, sample: Sample, alpha: float, objective: str) -> Tensor:
    """Of one sample at one point of the path, in a pass of its own."""
    module = model.get_submodule(layer)
    beta = _last_activation(model, module, sample[0])
    activation = (alpha * beta).requires_grad_()
    (gradient,) = torch.autograd.grad(_value(model, module, sample[0], sample[1], activation, objective), activation)
    return beta.double() * gradient.double()


def naive_estimate(
    model: nn.Module, rows: list[tuple[Tensor, Tensor]], method: str, passes: int, seed: int, objective: str
) -> dict[str, Tensor]:
    """Each visit of the design by itself."""
    layers = list(down_projections(model))
    generator = torch.Generator().manual_seed(seed)
    total: dict[str, Tensor | float] = dict.fromkeys(layers, 0.0)
    for group in together(samples_of(rows), method):
        design = Design.draw(len(layers), len(group), generator)
        for number, sample in enumerate(group):
            for layer in layers:
                total[layer] = total[layer] + gradient_times_activation(model, layer, sample, 1.0, objective)
            for visit in range(passes - 1):
                layer, alpha = layers[design.layer[visit, number]], design.alpha[visit, number].item()
                change = gradient_times_activation(model, layer, sample, alpha, objective)
                change = change - gradient_times_activation(model, layer, sample, 1.0, objective)
                total[layer] = total[layer] + len(layers) / (passes - 1) * change / (2 * (1 - alpha))
    return {layer: each for layer, each in total.items() if isinstance(each, Tensor)}


def estimate(
    model: nn.Module,
    rows: list[tuple[Tensor, Tensor]],
    passes: int,
    seed: int,
    method: str = "packed",
    objective: Objective = "logprob",
    limit: int = 2**30,
) -> dict[str, LayerSum]:
    """The passes alone, without any check of the method."""
    layers, path = down_projections(model), AttributionPath(objective)
    with frozen(model):
        found = list(
            _ROWS[method](model, collect_sequences([padded_batch(rows, "right")]), layers, path, Memory(limit, 2**11))
        )
        run = Passes(found, layers, torch.Generator().manual_seed(seed))
        for _ in range(passes):
            run.run()
    return run.sums()


@given(
    st.sampled_from(["llama", "gpt2", "opt", "mixtral"]),
    st.sampled_from(["packed", "decode", "prefix"]),
    st.sampled_from(["logprob", "prob"]),
    st.sampled_from([2, 3]),
    seeds,
)
def test_an_estimate_equals_one_pass_per_visit_of_its_design(
    name: str, method: str, objective: Objective, passes: int, seed: int
) -> None:
    model, rows = lively(name), sequences(seed, num_rows=2, longest=5)
    found = estimate(model, rows, passes, 0, method, objective)
    for layer, expected in naive_estimate(model, rows, method, passes, 0, objective).items():
        assert relative_error(found[layer].scores, expected) < 1e-3


@pytest.mark.parametrize("method", ["packed", "decode", "prefix"])
def test_a_budget_too_small_for_exact_scores_gives_the_estimate(method: str) -> None:
    model, rows = lively("mixtral", num_hidden_layers=4), sequences(5, num_rows=2, longest=5)
    found = loosely(model, [padded_batch(rows, "left")], method=method, budget=2)
    for layer, expected in estimate(model, rows, 2, 0, method).items():
        assert relative_error(found.scores[layer], expected.scores) < 1e-5
        assert found.standard_error[layer].norm() > 0


@given(st.integers(1, 9), st.integers(1, 20), seeds)
def test_a_design_visits_every_layer_once_and_the_layers_evenly(num_layers: int, num_samples: int, seed: int) -> None:
    design = Design.draw(num_layers, num_samples, torch.Generator().manual_seed(seed))
    for number in range(num_samples):
        assert sorted(design.layer[:, number].tolist()) == list(range(num_layers))
    counts = torch.stack([torch.bincount(row, minlength=num_layers) for row in design.layer])
    assert (counts.max(1).values - counts.min(1).values).max() <= 1
    assert ((design.alpha >= 0) & (design.alpha < 1)).all()
    for number in range(num_layers):
        assert abs(design.half[design.layer == number].sum()) <= 1


def test_any_visit_of_a_design_has_a_uniform_layer_and_a_point_of_its_density() -> None:
    designs = [Design.draw(4, 3, torch.Generator().manual_seed(seed)) for seed in range(800)]
    first = torch.stack([design.layer[1, 2] for design in designs])
    assert (torch.bincount(first) / len(designs) - 0.25).abs().max() < 0.07
    points = torch.stack([design.alpha[1, 2] for design in designs]).sort().values
    # The distribution of the density 2 (1 - alpha), by the largest distance (Kolmogorov; 1 in 1000 beyond it).
    expected = 1 - (1 - points) ** 2
    assert (expected - torch.arange(len(designs)) / len(designs)).abs().max() < 1.95 / len(designs) ** 0.5


def test_the_mean_of_many_estimates_is_the_integral_and_their_errors_are_at_most_what_they_say() -> None:
    model, rows, draws = lively("llama"), sequences(1, num_rows=4), 80
    exact = loosely(model, [padded_batch(rows, "right")], method="packed", rule="gauss", steps=48)
    found = [estimate(model, rows, 2, seed) for seed in range(draws)]
    for layer, scores in exact.scores.items():
        each = torch.stack([one[layer].scores for one in found])
        spread = (each - scores).square().mean(0).sum().sqrt()
        assert (each.mean(0) - scores).norm() < 3 * spread / draws**0.5
        said = torch.stack([one[layer].variance for one in found]).mean(0).sum().sqrt()
        assert 0.5 * said < spread < 1.05 * said


def test_more_passes_come_closer() -> None:
    model, rows = lively("llama"), sequences(1, num_rows=6)
    exact = loosely(model, [padded_batch(rows, "right")], method="packed", rule="gauss", steps=48).scores
    errors = {
        passes: sum(
            relative_error(each.scores, exact[layer])
            for seed in range(10)
            for layer, each in estimate(model, rows, passes, seed).items()
        )
        for passes in (2, 3)
    }
    assert errors[3] < 0.6 * errors[2]


def test_a_budget_that_fits_gives_exact_scores_with_as_many_points_as_fit() -> None:
    model, batch = lively("llama"), padded_batch(sequences(3), "right")
    # Two layers: three passes for a point and for the end at zero, by decoding four; two for a point alone.
    packed = ((2, 1), (3, 1), (4, 1), (5, 2), (6, 3), (1000, 3), (timedelta(hours=1), 3))
    for method, budget, steps in [("packed", *each) for each in packed] + [("decode", 2, 1), ("decode", 7, 2)]:
        found = loosely(model, [batch], method=method, rule="gauss", steps=3, budget=budget)
        expected = loosely(model, [batch], method=method, rule="gauss", steps=steps)
        assert found.completeness_error == ({} if budget == 2 else expected.completeness_error)
        assert not found.standard_error
        assert all(torch.equal(scores, expected.scores[layer]) for layer, scores in found.scores.items())


def test_a_time_too_short_for_anything_gives_two_passes() -> None:
    model, batch = lively("llama", num_hidden_layers=6), padded_batch(sequences(3), "right")
    short, two = (loosely(model, [batch], method="packed", budget=budget) for budget in (timedelta(microseconds=1), 2))
    assert short.incompleteness == {}
    assert all(torch.equal(scores, two.scores[layer]) for layer, scores in short.scores.items())


def test_the_halves_of_an_estimate_meet_in_its_scores_and_a_sum_adds_what_they_differ_by(tmp_path: Path) -> None:
    model = lively("llama", num_hidden_layers=6)
    first, second = (
        loosely(model, [padded_batch(sequences(seed), "right")], method="packed", budget=2) for seed in (1, 2)
    )
    first.save(tmp_path / "scores.safetensors")
    first, both = Attribution.load(tmp_path / "scores.safetensors"), first + second
    for layer, scores in both.scores.items():
        one, two = (half.scores[layer] for half in both.halves)
        torch.testing.assert_close((one + two) / 2, scores)
        torch.testing.assert_close(one - two, 2 * (first.difference[layer] + second.difference[layer]))
        squares = first.standard_error[layer].square() + second.standard_error[layer].square()
        torch.testing.assert_close(both.standard_error[layer].square(), squares)
    assert not torch.equal(*(torch.cat(list(half.scores.values())) for half in first.halves))


def test_draws_follow_the_generator() -> None:
    model, batch = lively("llama", num_hidden_layers=6), padded_batch(sequences(1), "right")
    one, again, other = (
        loosely(model, [batch], method="packed", budget=2, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    layer = next(iter(one.scores))
    assert torch.equal(one.scores[layer], again.scores[layer])
    assert not torch.equal(one.scores[layer], other.scores[layer])
    assert one.provenance["seed"] != other.provenance["seed"]


@pytest.mark.parametrize("method", ["packed", "decode", "prefix"])
def test_a_small_memory_changes_no_estimate(method: str) -> None:
    model, rows = lively("gpt2"), sequences(3)
    expected = estimate(model, rows, 3, 0, method)
    for layer, found in estimate(model, rows, 3, 0, method, limit=2**13).items():
        assert relative_error(found.scores, expected[layer].scores) < 1e-4


def test_an_interrupted_estimate_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_simu.attribution.attribute._ESTIMATE_TOKENS", 8)
    model, path = lively("llama", num_hidden_layers=6), tmp_path / "partial.safetensors"
    batches = [padded_batch(sequences(1), "right")]
    options = {"method": "packed", "budget": 3}
    calls: list[tuple[int, int]] = []

    def stop(*call: int) -> None:
        calls.append(call)
        if len(calls) == 5:
            raise KeyboardInterrupt

    whole = loosely(model, batches, **options)
    with pytest.raises(KeyboardInterrupt):
        loosely(model, batches, resume=path, progress=stop, **options)
    with pytest.raises(ValueError, match="was written with budget '3', expected '2'"):
        loosely(model, batches, resume=path, **{**options, "budget": 2})
    calls.clear()
    resumed = loosely(model, batches, resume=path, progress=lambda *call: calls.append(call), **options)
    assert 0 < calls[0][0] <= calls[-1][0] == calls[-1][1]
    assert not path.exists()
    for layer, scores in whole.scores.items():
        assert torch.equal(resumed.scores[layer], scores)
        assert torch.equal(resumed.standard_error[layer], whole.standard_error[layer])


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (1, ValueError, "budget is 1, expected"),
        (True, TypeError, "budget is True"),
        (2.5, TypeError, "budget is 2.5"),
        (timedelta(0), ValueError, "budget is 0:00:00, expected a positive duration"),
    ],
)
def test_a_budget_that_is_none_is_named(budget: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attribute_neurons(lively("llama"), [padded_batch(sequences(1), "right")], budget=budget)


def test_methods_that_change_all_positions_take_no_budget() -> None:
    with pytest.raises(ValueError, match="budget is given with method 'joint', which changes all positions"):
        attribute_neurons(lively("llama"), [padded_batch(sequences(1), "right")], budget=2, method="joint")
