"""With `capturable` a step and a refresh can be captured once and replayed: all that changes is on the device."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import assume, given
from torch import nn

from tests import laws
from tests.fake_cuda.tape import Tape
from tests.strategies import float_dtypes, layers, normal, options, seeds
from torch_simu import SIMUOptimizer
from torch_simu.optimizer.guard import Guard
from torch_simu.update import counted_uniform

OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "foreach": {"foreach": True, "weight_decay": 0.1},
    "tensor lr": {"lr": torch.tensor(0.01)},
    "squared gradient": {"curvature": "squared_gradient", "hessian_interval": 3, "rho": 10.0},
    "stochastic rounding": {"stochastic_rounding": True},
    "stochastic rounding, foreach": {"stochastic_rounding": True, "foreach": True},
    "master weights": {"master_weights": True},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
}


def make(dtype, **options):
    """Columns, rows, a whole weight, and fused experts."""
    weights = [
        nn.Parameter(normal(n, *shape, dtype=dtype)) for n, shape in enumerate(((4, 6), (5, 3), (3,), (2, 3, 4)))
    ]
    groups = [
        {"params": weights[:1], "neurons": [[0, 2, 5]]},
        {"params": weights[1:2], "neurons": [[1, 4]], "neuron_dim": 0},
        {"params": weights[2:3]},
        {"params": weights[3:], "neurons": [[1, 2, 7]], "neuron_dim": (0, 2)},
    ]
    chosen = {"lr": 0.01, "rho": 1.0, "hessian_interval": 2, **copy.deepcopy(options)}
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    return weights, SIMUOptimizer(groups, capturable=True, **chosen)


def fill(weights, number, bad=False):
    """Gradients at the addresses that were captured."""
    for place, weight in enumerate(weights):
        weight.grad.copy_(normal(100 * number + place, *weight.shape, dtype=weight.dtype))
    if bad:
        weights[0].grad[0, 2] = math.nan


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_replayed_step_and_refresh_are_those_that_would_have_been_made(options, dtype):
    runs = [make(dtype, **options) for _ in range(2)]
    gauss_newton = options.get("curvature") is None
    for weights, optimizer in runs:
        fill(weights, 0)
        optimizer.step()
        if gauss_newton:
            optimizer.update_hessian(3)
    # What is captured is run as well, so both make it.
    (weights, eager), (replayed, captured) = runs
    step, refresh = Tape(), Tape()
    for each in (weights, replayed):
        fill(each, 1)
    eager.step()
    with step:
        captured.step()
    if gauss_newton:
        eager.update_hessian(3)
        with refresh:
            captured.update_hessian(3)
    for number in range(2, 9):
        for each in (weights, replayed):
            fill(each, number, bad=number in (3, 6))
        eager.step()
        step.replay()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert eager.hessian_due == captured.hessian_due
            if eager.hessian_due:
                eager.update_hessian(3)
                refresh.replay()
        assert all(torch.equal(one, other) for one, other in zip(weights, replayed, strict=True))
    for one, other in zip(weights, replayed, strict=True):
        for key, value in eager.state[one].items():
            assert torch.equal(value, captured.state[other][key])
    counts = ("num_steps", "next_refresh")
    mine, theirs = (optimizer.state_dict()["param_groups"] for optimizer in (eager, captured))
    assert [[group[key] for key in counts] for group in mine] == [[group[key] for key in counts] for group in theirs]
    assert mine[0]["num_steps"] == 7
    assert captured.diagnostics()["skipped_steps"] >= 2


@given(layers(), options, seeds)
def test_every_step_matches_dense_masked_sophia(layer, o, seed):
    laws.steps_match_the_reference(SIMUOptimizer, layer, o, seed, capturable=True)


@given(layers(), options, seeds)
def test_unselected_neurons_have_no_optimizer_state(layer, o, seed):
    laws.state_is_compact(SIMUOptimizer, layer, o, seed, capturable=True)


@given(layers(), options, seeds)
def test_no_entry_moves_farther_than_lr_times_clip(layer, o, seed):
    laws.steps_are_bounded(SIMUOptimizer, layer, o, seed, 1e20, capturable=True)


@given(layers(), options, float_dtypes, seeds)
def test_unselected_weights_stay_and_a_reload_goes_on_also_with_draws(layer, o, dtype, seed):
    for way in ({}, {"stochastic_rounding": True}, {"master_weights": True}):
        laws.unselected_weights_stay(SIMUOptimizer, layer, o, dtype, seed, capturable=True, **way)
        laws.reload_continues_identically(SIMUOptimizer, layer, o, dtype, seed, capturable=True, **way)


@given(layers(), options, seeds)
def test_what_was_not_finite_is_neither_a_step_nor_a_refresh_and_is_said_when_the_device_is_read(layer, o, seed):
    assume(layer.neurons)
    runs = [laws.make(SIMUOptimizer, layer, o, capturable=capturable) for capturable in (False, True)]
    for number in range(8):
        for param, optimizer in runs:
            for refresh in (False, True):
                param.grad = normal(seed + 2 * number + refresh, *param.shape)
                if number in (2, 3, 6):
                    param.grad[layer.mask().nonzero()[0].unbind()] = math.inf
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)
                    if not refresh:
                        optimizer.step()
                    elif optimizer.hessian_due:
                        optimizer.update_hessian(3)
        plain, captured = (optimizer for _, optimizer in runs)
        groups = [optimizer.state_dict()["param_groups"][0] for optimizer in (plain, captured)]
        assert all(groups[0][key] == groups[1][key] for key in ("num_steps", "next_refresh"))
    assert torch.equal(runs[0][0], runs[1][0])
    assert plain.diagnostics()["skipped_steps"] == captured.diagnostics()["skipped_steps"]


def test_reading_the_device_says_what_was_stopped():
    param = nn.Parameter(torch.ones(2))
    optimizer = SIMUOptimizer([param], capturable=True)
    param.grad = torch.tensor([1.0, math.nan])
    optimizer.step()
    optimizer.step()
    with pytest.warns(RuntimeWarning, match="2 steps or refreshes changed nothing"):
        assert not optimizer.hessian_due
    assert optimizer.state_dict()["param_groups"][0]["num_steps"] == 0
    assert param.tolist() == [1.0, 1.0]


def test_draws_from_a_counter_are_uniform_and_unrelated():
    draws = torch.stack([counted_uniform((4000,), torch.tensor(seed)) for seed in (0, 1, 2, 10_007, 1_000_003)])
    assert draws.min() >= 0
    assert draws.max() < 1
    torch.testing.assert_close(draws.mean(1), torch.full((5,), 0.5), rtol=0, atol=0.02)
    torch.testing.assert_close(draws.var(1), torch.full((5,), 1 / 12), rtol=0, atol=0.004)
    related = torch.corrcoef(torch.cat([draws, draws.roll(1, 1)]))
    assert (related - torch.eye(10)).abs().max() < 0.06
    assert torch.equal(draws[0], counted_uniform((4000,), torch.tensor(0)))


@pytest.mark.parametrize("bad", [(), (1,), (4, 5), (8,)])
def test_a_gpu_is_read_only_where_a_refresh_may_be_due(bad, monkeypatch):
    """As on a GPU without `capturable`: the device decides, and the host knows when nothing can be due."""
    runs = []
    for on_device in (False, True):
        param = nn.Parameter(torch.ones(2))
        optimizer = SIMUOptimizer([param], hessian_interval=4)
        if on_device:
            monkeypatch.setattr(Guard, "passes", lambda self, entries, *_: next(iter(entries)).grad.isfinite().all())
        seen, reads = [], 0
        for number in range(20):
            param.grad = torch.full((2,), math.nan if number in bad else 1.0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                optimizer.step()
            reads += not optimizer._guard.rests()
            seen.append(optimizer.hessian_due)
            if seen[-1]:
                param.grad = torch.ones(2)
                optimizer.update_hessian(1)
        runs.append((seen, reads))
    assert runs[0][0] == runs[1][0]
    assert runs[1][1] < 14
