"""Of selected units the columns and the rows train, and nothing else: every law of the optimizer holds for both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests import mutants
from tests.optimizer.units.mlps import LAYOUTS, Mlp, MlpNet, mlps
from tests.reference import DenseMaskedSophia
from tests.strategies import Options, float_dtypes, normal, options, seeds
from torch_simu import NeuronSelection, SIMUOptimizer
from torch_simu.layers import Source

pytestmark = pytest.mark.usefixtures("device")

OPTIONS = Options(lr=0.05, beta1=0.5, beta2=0.9, rho=1.0, weight_decay=0.1, clip=0.5, interval=2)


def optimizer_of(implementation: Callable[..., SIMUOptimizer], mlp: Mlp, net: MlpNet, options: Options, **extra: Any):
    """An optimizer on the selected units of a network."""
    return implementation(
        mlp.selection.param_groups(net, units=True),
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        rho=options.rho,
        weight_decay=options.weight_decay,
        clip=options.clip,
        hessian_interval=options.interval,
        **extra,
    )


def train(net: MlpNet, optimizer: SIMUOptimizer, seed: int, start: int, stop: int) -> None:
    """Steps with drawn gradients of everything, and refreshes."""
    for number in range(start, stop):
        grads(net, seed + 20 * number)
        optimizer.step()
        if optimizer.hessian_due:
            grads(net, seed + 20 * number + 10)
            optimizer.update_hessian(7)


def grads(net: MlpNet, seed: int) -> None:
    """Leave a drawn gradient on every parameter."""
    for place, param in enumerate(net.parameters()):
        param.grad = normal(seed + place, *param.shape, dtype=param.dtype)


def off_the_units_nothing_moves(
    implementation: Callable[..., SIMUOptimizer], mlp: Mlp, options: Options, dtype: torch.dtype, seed: int
) -> None:
    """Law 1, over all parameters, also after a reload; and what is selected moves."""
    net = mlp.make(dtype)
    before = copy.deepcopy(dict(net.named_parameters()))
    optimizer = optimizer_of(implementation, mlp, net, options)
    train(net, optimizer, seed, 0, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, seed, 2, 4)
    for name, mask in mlp.masks().items():
        after = net.get_parameter(name)
        assert torch.equal(after[~mask], before[name][~mask])
        # In half precision a small step may be rounded away.
        assert dtype != torch.float64 or not mask.any() or (after != before[name])[mask].any()


@given(mlps(), options, float_dtypes, seeds)
def test_off_the_units_everything_is_bit_identical(mlp: Mlp, options: Options, dtype: torch.dtype, seed: int) -> None:
    off_the_units_nothing_moves(SIMUOptimizer, mlp, options, dtype, seed)


@given(mlps(), options, seeds)
def test_the_state_is_that_of_the_units(mlp: Mlp, options: Options, seed: int) -> None:
    state_is_that_of_the_units(mlp, options, seed)


def state_is_that_of_the_units(mlp: Mlp, options: Options, seed: int) -> None:
    """Law 2: momentum and curvature of every entry of a unit, and nothing else."""
    net = mlp.make()
    optimizer = optimizer_of(SIMUOptimizer, mlp, net, options)
    train(net, optimizer, seed, 0, 2)
    for name, mask in mlp.masks().items():
        held = [value.numel() for value in optimizer.state.get(net.get_parameter(name), {}).values() if value.dim()]
        assert sum(held) == 2 * mask.sum() and (not mask.any() or len(held) == 2)


@given(mlps(), options, seeds)
def test_a_step_is_that_of_dense_sophia_masked(mlp: Mlp, options: Options, seed: int) -> None:
    net = mlp.make(torch.float64)
    optimizer = optimizer_of(SIMUOptimizer, mlp, net, options, state_dtype=torch.float64)
    masks = mlp.masks()
    oracles = {name: DenseMaskedSophia(net.get_parameter(name).detach(), masks[name], options) for name in masks}
    for number in range(4):
        grads(net, seed + 20 * number)
        for name, oracle in oracles.items():
            oracle.step(net.get_parameter(name).grad)
        optimizer.step()
        if number % options.interval == 0:
            grads(net, seed + 20 * number + 10)
            for name, oracle in oracles.items():
                oracle.refresh(net.get_parameter(name).grad, 7)
            optimizer.update_hessian(7)
    for name, oracle in oracles.items():
        torch.testing.assert_close(net.get_parameter(name).detach(), oracle.weight, rtol=1e-9, atol=1e-12)


@given(mlps(), float_dtypes, seeds)
def test_a_reload_continues_bit_by_bit(mlp: Mlp, dtype: torch.dtype, seed: int) -> None:
    nets = [mlp.make(dtype) for _ in range(2)]
    first, second = (optimizer_of(SIMUOptimizer, mlp, net, OPTIONS) for net in nets)
    train(nets[0], first, seed, 0, 3)
    nets[1].load_state_dict(nets[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for net, optimizer in zip(nets, (first, second), strict=True):
        train(net, optimizer, seed, 3, 5)
    assert all(torch.equal(one, two) for one, two in zip(*(net.parameters() for net in nets), strict=True))


@given(mlps(), st.sets(st.integers(0, 5)), seeds)
def test_another_selection_moves_rows_and_columns(mlp: Mlp, others: set[int], seed: int) -> None:
    """Entries in both go on with their state, new ones start at zero, and nothing else moves any more."""
    new = Mlp(**{**vars(mlp), "neurons": tuple(sorted(each for each in others if each < mlp.num_neurons))})
    net = mlp.make()
    optimizer = optimizer_of(SIMUOptimizer, mlp, net, OPTIONS)
    train(net, optimizer, seed, 0, 3)
    moments = {}
    for name, mask in mlp.masks().items():
        moments[name] = torch.zeros(mask.shape)
        if mask.any():
            moments[name][mask] = optimizer.state[net.get_parameter(name)]["exp_avg"].flatten()
    optimizer.change_selection(new.selection, net)
    before = copy.deepcopy(dict(net.named_parameters()))
    for name, mask in new.masks().items():
        state = optimizer.state.get(net.get_parameter(name), {})
        if state and mask.any():
            kept = torch.where(mask & mlp.masks()[name], moments[name], 0)
            assert torch.equal(state["exp_avg"].flatten(), kept[mask])
    train(net, optimizer, seed + 1, 3, 5)
    for name, mask in new.masks().items():
        after = net.get_parameter(name)
        assert torch.equal(after[~mask], before[name][~mask])
        assert not mask.any() or (after != before[name])[mask].any()


def test_without_units_another_selection_leaves_rows_alone() -> None:
    mlp = Mlp("gated", 3, 4, True, (1, 2), 0)
    net = mlp.make()
    optimizer = SIMUOptimizer(mlp.selection.param_groups(net))
    optimizer.change_selection(NeuronSelection({"down": [0]}, {"down": 4}), net)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    assert "rows" not in optimizer.param_groups[0]


def test_a_layer_that_joins_brings_its_rows() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Mlp("gated", 3, 4, True, (), 0).make(), Mlp("conv", 3, 5, True, (), 1).make()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    net = Two()
    optimizer = SIMUOptimizer(NeuronSelection({"first.down": [1]}, {"first.down": 4}).param_groups(net, units=True))
    both = NeuronSelection({"first.down": [2], "second.down": [0, 3]}, {"first.down": 4, "second.down": 5})
    optimizer.change_selection(both, net)
    names = {param: name for name, param in net.named_parameters()}
    found = {
        names[param]: (group["neuron_dim"], group.get("rows", False), chosen)
        for group in optimizer.param_groups
        for param, chosen in zip(group["params"], group["neurons"], strict=True)
    }
    assert found == {
        "first.down.weight": (-1, False, [2]),
        **{f"first.{part}.{key}": (0, True, [2]) for part in ("gate", "up") for key in ("weight", "bias")},
        "second.down.weight": (0, False, [0, 3]),
        "second.up.weight": (-1, True, [0, 3]),
        # Of one dimension, along which any group of rows counts.
        "second.up.bias": (0, True, [0, 3]),
    }


def test_state_of_columns_is_no_state_of_rows() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    rows, columns = (
        SIMUOptimizer([{"params": [weight], "neurons": [[1]], "neuron_dim": 0, **mark}])
        for mark in ({"rows": True}, {})
    )
    with pytest.raises(ValueError, match="Group 0 of the saved state selects columns, expected rows"):
        rows.load_state_dict(columns.state_dict())
    with pytest.raises(ValueError, match="Group 0 of the saved state selects rows, expected columns"):
        columns.load_state_dict(rows.state_dict())


CASES = [Mlp(layout, 3, 4, True, (0, 2), 1) for layout in LAYOUTS]


@pytest.mark.parametrize("mutant", [mutants.DecaysEveryColumn, mutants.steps_beside_the_neurons])
def test_a_wrong_step_of_units_is_seen(mutant: Any) -> None:
    with mutants.implementation(mutant) as implementation, pytest.raises(AssertionError):
        for mlp in CASES:
            off_the_units_nothing_moves(implementation, mlp, OPTIONS, torch.float32, 0)


def test_rows_of_one_half_only_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "rows", lambda self, neurons: list(neurons))
    with pytest.raises(AssertionError):
        state_is_that_of_the_units(CASES[LAYOUTS.index("fused")], OPTIONS, 0)
