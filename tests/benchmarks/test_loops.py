"""Loops of the harness: what an adversary and the covariances see, and RepSelect's gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.harness.collapsing import collapsed, collapsing, mlp_weights
from benchmarks.forgetting.harness.contenders import CONTENDERS
from benchmarks.forgetting.harness.running import forgotten
from benchmarks.forgetting.harness.targets import TARGETS, case_of
from benchmarks.forgetting.lasting import configured
from benchmarks.forgetting.tried.loop import DAMPING, Loop
from tests.strategies import normal
from torch_simu import register_neuron_hooks
from torch_simu.unlearning.adversary import Adversary
from torch_simu.unlearning.objectives import mean_answer_nll
from torch_simu.whitening import undamped


@pytest.fixture(scope="module")
def case() -> Case:
    """A few people in a tiny Llama."""
    return case_of("quick", "llama", 0, None, None)


def copies(case: Case, steps: int, every: int) -> list[Tensor]:
    """The adversary's weights after some steps of a loop at whose step size nothing moves."""
    loop = Loop(case, 0, lr=0.0, max_steps=steps, adversary_lr=1e-3, adversary_every=every)
    loop.run()
    assert isinstance(loop.adversary, Adversary)
    return [value for name, value in loop.adversary.state().items() if name.startswith("value")]


def test_an_adversary_of_every_second_step_stays_where_it_is_between(case: Case) -> None:
    once, twice, second = copies(case, 1, 1), copies(case, 2, 1), copies(case, 2, 2)
    assert all(torch.equal(*pair) for pair in zip(once, second, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(once, twice, strict=True))


@pytest.mark.parametrize("sets", [("forget",), ("retain",), ("forget", "retain")])
def test_covariances_are_of_the_sets_that_are_named(case: Case, sets: tuple[str, ...]) -> None:
    loop = Loop(case, 0, lr=0.0, max_steps=1, covariance_of=sets)
    loop.run()
    with register_neuron_hooks(case.model, loop.selection, reduce="covariance") as hooks:
        for name in sets:
            mean_answer_nll(case.model, loop.batch(name, 0)).backward()
    case.model.zero_grad()
    for param, expected in zip(loop.trained(), hooks.values(), strict=True):
        found = undamped(loop.optimizer.state[param]["neuron_factor"], damping=DAMPING)
        # Hooks hold sums over positions.
        scale = found.trace() / expected.trace()
        torch.testing.assert_close(found, scale * expected, rtol=1e-3, atol=1e-4)


def test_what_is_collapsed_is_as_large_as_the_smallest_of_it() -> None:
    gradient = normal(0, 12, 3) @ normal(1, 3, 20) + 1e-3 * normal(2, 12, 20)
    sizes = torch.linalg.svdvals(gradient)
    after = torch.linalg.svdvals(collapsed(gradient, 3))
    # Both sides are divided, each by the share of the smallest.
    expected = sizes[:3] * (sizes[2] / sizes[:3]).square()
    torch.testing.assert_close(after[:3], expected.sort(descending=True).values, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(collapsed(gradient, 1), gradient, rtol=1e-4, atol=1e-4)


def test_repselect_steps_along_one_gradient_of_the_mlps_and_ends_at_the_target(case: Case) -> None:
    target, contender = TARGETS["demo"], CONTENDERS["RepSelect"]
    target = target._replace(probability=0.5)
    config = configured(case, target, 0, contender, lr=target.rates[contender.unit][0])
    model, row = forgotten(case, contender, config, traced=False)
    assert row["reached"]
    named = dict(case.model.named_parameters())
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, named[name])}
    assert moved == {name for name in named if ".mlp." in name} and len(moved) == len(mlp_weights(model))
    start = copy.deepcopy(case.model)
    weights, gradients = collapsing(start, case, config)
    assert all(torch.equal(*pair) for pair in zip(start.parameters(), case.model.parameters(), strict=True))
    for new, old, gradient in zip(mlp_weights(model), weights, gradients, strict=True):
        assert torch.cosine_similarity((old - new).flatten(), gradient.flatten(), dim=0) > 0.999
