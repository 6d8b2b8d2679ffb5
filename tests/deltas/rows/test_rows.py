"""Deltas of rows: what makes selected neurons trains beside codes as the dense rows would, and nothing else moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.deltas.rows.nets import D_MODEL, chosen_neurons, coded, deltas_of, layouts, mlp, net_of, outputs, rows_of
from tests.deltas.test_deltas import KINDS, SIZE, WIDTH, as_model, frozen_bits, run
from tests.optimizer.units.mlps import Mlp
from tests.strategies import normal, seeds
from torch_simu import NeuronSelection, SIMUOptimizer, attach_deltas, detach_deltas
from torch_simu.deltas import attached_layers, trained_groups
from torch_simu.deltas.attach import NOTHING, attach_places
from torch_simu.deltas.layer import DeltaLayer

pytestmark = pytest.mark.usefixtures("device")


def with_rows(
    kind: str, rows: set[int], seed: int, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer whose delta of rows is not zero, and its change as a weight and a bias of the layer's size."""
    model = as_model(kind, seed, dtype)
    attach_places(model, NOTHING, NeuronSelection({"0": rows}, {"0": WIDTH}))
    weight, bias = torch.zeros(WIDTH, SIZE, dtype=dtype), torch.zeros(WIDTH, dtype=dtype)
    for dense, delta in zip((weight, bias), model[0].deltas().values(), strict=False):
        delta.data.copy_(normal(seed + delta.dim(), *delta.shape))
        dense[sorted(rows)] = delta.detach().to(dtype)
    assert (model[0].delta_bias is None) == (model[0].bias is None)
    return model, weight, bias


def assert_output_is_that_of_changed_rows(kind: str, rows: set[int], seed: int) -> None:
    """Off the rows to the last bit; on them in float64 where the layer has weights."""
    dtype = torch.float64 if kind in ("linear", "conv1d") else torch.float32
    model, weight, bias = with_rows(kind, rows, seed, dtype)
    x = normal(seed + 3, 2, 5, SIZE, dtype=dtype)
    found = model(x)
    detach_deltas(model)
    base = model(x)
    kept = [output for output in range(WIDTH) if output not in rows]
    assert torch.equal(found[..., kept], base[..., kept])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, base + x @ weight.T + bias, rtol=tolerance, atol=10 * tolerance)


@given(st.sampled_from(list(KINDS)), outputs, seeds)
def test_the_output_is_that_of_the_layer_with_changed_rows(kind: str, rows: set[int], seed: int) -> None:
    assert_output_is_that_of_changed_rows(kind, rows, seed)


def _adds_beside(layer: DeltaLayer, x: Tensor) -> Tensor:
    return layer._base(x).index_add(-1, (layer.idx + 1) % WIDTH, nn.functional.linear(x, layer.delta.to(x.dtype)))


def _replaces(layer: DeltaLayer, x: Tensor) -> Tensor:
    return layer._base(x).index_copy(-1, layer.idx, nn.functional.linear(x, layer.delta.to(x.dtype)))


@pytest.mark.parametrize("mutant", [_adds_beside, _replaces])
def test_a_wrong_output_is_seen(monkeypatch: pytest.MonkeyPatch, mutant: Any) -> None:
    monkeypatch.setattr(DeltaLayer, "forward", mutant)
    with pytest.raises(AssertionError):
        assert_output_is_that_of_changed_rows("8bit", {1, 5}, 0)


@given(st.sampled_from(list(KINDS)), outputs, seeds)
def test_the_gradient_is_that_of_the_dense_rows(kind: str, rows: set[int], seed: int) -> None:
    model, weight, _ = with_rows(kind, rows, seed)
    x = normal(seed + 3, 2, 5, SIZE)
    plain, found = copy.deepcopy(model), x.clone().requires_grad_()
    detach_deltas(plain)
    y = model(found)
    along = normal(seed + 4, *y.shape)
    y.backward(along)
    wanted = torch.einsum("bto,bti->oi", along, x)[sorted(rows)]
    torch.testing.assert_close(model[0].delta.grad, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    if model[0].delta_bias is not None:
        torch.testing.assert_close(model[0].delta_bias.grad, along.sum((0, 1))[sorted(rows)], rtol=1e-5, atol=1e-5)
    # Of the input, too: that of the base, and of the rows beside it.
    through = x.clone().requires_grad_()
    plain(through).backward(along)
    torch.testing.assert_close(found.grad, through.grad + along @ weight, rtol=1e-4, atol=1e-3)


def assert_codes_outlive_units(shape: Mlp, kind: str, train: bool, seed: int) -> None:
    """Law 8, for columns and rows; and the rows are those that make the neurons."""
    net = net_of(shape, kind).train(train)
    x = normal(seed + 2, 2, 5, D_MODEL)
    # Once before, since layers of bitsandbytes change in their first pass.
    run(net, x)
    expected = run(net, x)
    keys, layers = set(net.state_dict()), {name: net.get_submodule(name) for name in ("down", *rows_of(shape))}
    before, plain = {name: frozen_bits(layer) for name, layer in layers.items()}, list(map(type, layers.values()))
    deltas = attach_deltas(net, shape.selection, units=True)
    assert {name: layer.idx.tolist() for name, layer in attached_layers(net).items() if layer.rows} == rows_of(shape)
    assert set(deltas) == set(layers)
    made = {f"{name}.delta_bias" for name in rows_of(shape) if shape.bias} | {f"{name}.delta" for name in layers}
    assert set(net.state_dict()) == keys | made | {f"{name}.idx" for name in layers}
    assert all(torch.equal(*pair) for pair in zip(run(net, x), expected, strict=True))
    optimizer = SIMUOptimizer(trained_groups(net, shape.selection, "frozen", units=True), lr=0.1, weight_decay=0.1)
    assert {name for name, param in net.named_parameters() if param.requires_grad} == made
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    assert all(delta.dtype == torch.float32 and delta.any() for delta in deltas_of(net).values())
    detach_deltas(net)
    assert {name: frozen_bits(layer) for name, layer in layers.items()} == before
    assert list(map(type, layers.values())) == plain and set(net.state_dict()) == keys
    assert all(torch.equal(*pair) for pair in zip(run(net, x), expected, strict=True))


@given(layouts, coded, chosen_neurons, st.booleans(), st.booleans(), seeds)
def test_attaching_units_changes_no_bit_and_training_no_code(
    layout: str, kind: str, chosen: set[int], bias: bool, train: bool, seed: int
) -> None:
    assert_codes_outlive_units(mlp(layout, chosen, seed, bias=bias), kind, train, seed)


def _of_other_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda layer, indices, **more: original(layer, indices + 1 if more else indices, **more)


def _starts_off_zero(original: Callable[..., Any]) -> Callable[..., Any]:
    def attach(layer: nn.Module, indices: Tensor, **more: Any) -> nn.Parameter:
        delta = original(layer, indices, **more)
        delta.data.add_(1e-3 if more else 0.0)
        return delta

    return attach


@pytest.mark.parametrize("mutant", [_of_other_rows, _starts_off_zero])
def test_the_law_tells_mutants(monkeypatch: pytest.MonkeyPatch, mutant: Any) -> None:
    from torch_simu.deltas import attach as module

    monkeypatch.setattr(module, "attach", mutant(module.attach))
    with pytest.raises(AssertionError):
        assert_codes_outlive_units(mlp("gated", {1, 5}, 0), "8bit", False, 0)
