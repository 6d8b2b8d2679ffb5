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

from tests.deltas.test_deltas import KINDS, SIZE, WIDTH, as_model, bits, frozen_bits, run
from tests.optimizer.units.mlps import Mlp, MlpNet
from tests.quantized import quantized
from tests.strategies import normal, seeds
from torch_simu import NeuronSelection, SIMUOptimizer, attach_deltas, detach_deltas
from torch_simu.bitsandbytes.layers import decoded_weight
from torch_simu.deltas import attached_layers, decode_model, trained_groups, widen_deltas
from torch_simu.deltas.attach import NOTHING, attach_places
from torch_simu.deltas.layer import DeltaLayer
from torch_simu.optimizer import covariance_hooks

pytestmark = pytest.mark.usefixtures("device")

# As wide as a block of 4-bit codes.
D_MODEL, NUM_NEURONS = 64, 32
outputs = st.sets(st.integers(0, WIDTH - 1), min_size=1)
chosen_neurons = st.sets(st.integers(0, NUM_NEURONS - 1), min_size=1)
coded = st.sampled_from(["8bit", "4bit"])
layouts = st.sampled_from(["plain", "gated", "fused"])


def mlp(layout: str, neurons: set[int] | list[int], seed: int, *, bias: bool = True) -> Mlp:
    return Mlp(layout, D_MODEL, NUM_NEURONS, bias, tuple(sorted(neurons)), seed)


def net_of(shape: Mlp, kind: str) -> nn.Module:
    net = shape.make()
    return net if kind == "float" else quantized(net, kind)


def rows_of(shape: Mlp) -> dict[str, list[int]]:
    """Projection -> the rows that make the chosen neurons."""
    chosen = list(shape.neurons)
    if shape.layout == "fused":
        return {"up": chosen + [NUM_NEURONS + each for each in chosen]}
    return dict.fromkeys(("gate", "up") if shape.layout == "gated" else ("up",), chosen)


def with_rows(kind: str, rows: set[int], seed: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A layer whose delta of rows is not zero, and that delta as a matrix of the layer's size."""
    model = as_model(kind, seed, dtype)
    delta = attach_places(model, NOTHING, NeuronSelection({"0": rows}, {"0": WIDTH}))["0"]
    with torch.no_grad():
        delta.copy_(normal(seed + 2, *delta.shape))
    dense = torch.zeros(WIDTH, SIZE, dtype=dtype)
    dense[sorted(rows)] = delta.detach().to(dtype)
    return model, dense


def assert_output_is_that_of_changed_rows(kind: str, rows: set[int], seed: int) -> None:
    """Off the rows to the last bit; on them in float64 where the layer has weights."""
    dtype = torch.float64 if kind in ("linear", "conv1d") else torch.float32
    model, dense = with_rows(kind, rows, seed, dtype)
    x = normal(seed + 3, 2, 5, SIZE, dtype=dtype)
    found = model(x)
    detach_deltas(model)
    base = model(x)
    kept = [output for output in range(WIDTH) if output not in rows]
    assert torch.equal(found[..., kept], base[..., kept])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, base + x @ dense.T, rtol=tolerance, atol=10 * tolerance)


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
    model, dense = with_rows(kind, rows, seed)
    x = normal(seed + 3, 2, 5, SIZE)
    plain = copy.deepcopy(model)
    detach_deltas(plain)
    # Of the input, too: that of the base, and of the rows beside it.
    base, found = run(plain, x), x.clone().requires_grad_()
    y = model(found)
    along = normal(seed + 4, *y.shape)
    y.backward(along)
    wanted = torch.einsum("bto,bti->oi", along, x)[sorted(rows)]
    torch.testing.assert_close(model[0].delta.grad, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    through = x.clone().requires_grad_()
    plain(through).backward(along)
    torch.testing.assert_close(found.grad, through.grad + along @ dense, rtol=1e-4, atol=1e-3)
    assert base[0].shape == y.shape


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
    assert set(net.state_dict()) == keys | {f"{name}.{key}" for name in layers for key in ("delta", "idx")}
    assert all(torch.equal(*pair) for pair in zip(run(net, x), expected, strict=True))
    optimizer = SIMUOptimizer(trained_groups(net, shape.selection, "frozen", units=True), lr=0.1, weight_decay=0.1)
    assert {name for name, param in net.named_parameters() if param.requires_grad} == {
        f"{name}.delta" for name in layers
    }
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    assert all(delta.dtype == torch.float32 and delta.any() for delta in deltas.values())
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
    return lambda layer, indices, **more: original(layer, indices.flip(0) if more else indices, **more)


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


def steps(net: nn.Module, groups: list[dict[str, object]], curvature: str) -> None:
    """Five steps with refreshes on gradients that are drawn outputs first."""
    optimizer = SIMUOptimizer(groups, lr=0.02, betas=(0.5, 0.8), hessian_interval=2, curvature=curvature)
    for number in range(5):
        x, factor = normal(2 * number, 8, D_MODEL), normal(2 * number + 1, 8, D_MODEL)
        optimizer.zero_grad()
        if curvature == "gnb":
            (net(x) * factor).mean().backward()
            optimizer.step()
            if optimizer.hessian_due:
                optimizer.update_hessian(8)
            continue
        with covariance_hooks(net, optimizer) as hooks:
            (net(x) * factor).mean().backward()
        if optimizer.hessian_due:
            optimizer.update_curvature(hooks)
        optimizer.step()


@pytest.mark.parametrize("layout", ["gated", "fused"])
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@pytest.mark.parametrize("curvature", ["gnb", "neurons", "both"])
def test_a_step_is_that_of_the_rows_and_columns_of_the_decoded_model(layout: str, kind: str, curvature: str) -> None:
    shape = mlp(layout, [1, 4, 30], 0, bias=False)
    # In train mode 8 bits are computed with the decoded weight on a processor.
    net = net_of(shape, kind).train()
    dense = copy.deepcopy(net)
    decode_model(dense)
    before = {name: param.detach().clone() for name, param in dense.named_parameters()}
    steps(dense, shape.selection.param_groups(dense, units=True), curvature)
    steps(net, trained_groups(net, shape.selection, "frozen", units=True), curvature)
    for name, layer in attached_layers(net).items():
        change = layer.columns.gather(dense.get_submodule(name).weight.detach() - before[f"{name}.weight"])
        assert change.norm() > 1e-3 * layer.columns.gather(before[f"{name}.weight"]).norm()
        torch.testing.assert_close(layer.change, change, rtol=2e-2, atol=2e-3 * change.abs().max().item())


@given(layouts, st.sampled_from(["float", "8bit", "4bit"]), chosen_neurons, seeds)
def test_decoded_weights_have_the_change_in_columns_and_rows_and_nowhere_else(
    layout: str, kind: str, chosen: set[int], seed: int
) -> None:
    shape = mlp(layout, chosen, seed)
    net = net_of(shape, kind)
    base = copy.deepcopy(net)
    decode_model(base)
    for number, delta in enumerate(attach_deltas(net, shape.selection, units=True).values()):
        delta.data.copy_(normal(seed + number, *delta.shape))
    layers = {name: (layer.delta.detach(), layer.rows) for name, layer in attached_layers(net).items()}
    decode_model(net)
    assert not attached_layers(net)
    for name, (delta, rows) in layers.items():
        wanted = base.get_submodule(name).weight.detach().clone()
        if rows:
            wanted[rows_of(shape)[name]] += delta
        else:
            wanted[:, list(shape.neurons)] += delta
        assert torch.equal(net.get_submodule(name).weight, wanted)


def trained(shape: Mlp, kind: str) -> nn.Module:
    """A network whose deltas of columns and rows are not zero."""
    net = net_of(shape, kind)
    for number, delta in enumerate(attach_deltas(net, shape.selection, units=True).values()):
        delta.data.copy_(normal(shape.seed + number, *delta.shape))
    return net


def held(net: nn.Module) -> dict[tuple[str, int], bytes]:
    """(Layer, neuron or row) -> bits of its delta."""
    return {
        (name, index): bits(layer.delta[place] if layer.rows else layer.delta[:, place])
        for name, layer in attached_layers(net).items()
        for place, index in enumerate(layer.idx.tolist())
    }


@given(layouts, coded, chosen_neurons, chosen_neurons, seeds)
def test_a_second_request_holds_the_rows_of_the_first(
    layout: str, kind: str, first: set[int], second: set[int], seed: int
) -> None:
    one, two = mlp(layout, first, seed), mlp(layout, second, seed)
    net, x = trained(one, kind), normal(seed + 9, 5, D_MODEL)
    before, output = held(net), net(x).detach()
    optimizer = SIMUOptimizer(trained_groups(net, two.selection, "frozen", units=True), lr=0.1, weight_decay=0.1)
    torch.testing.assert_close(net(x), output, rtol=1e-4, atol=1e-4 * output.abs().max().item())
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    wanted = {(name, row) for name, rows in rows_of(two).items() for row in rows} | {("down", each) for each in second}
    after = held(net)
    assert after.keys() == before.keys() | wanted
    assert {key: after[key] for key in before.keys() - wanted} == {key: before[key] for key in before.keys() - wanted}
    assert all(after[key] != before.get(key) for key in wanted)


def test_columns_alone_may_be_asked_for_after_units_and_the_other_way_round() -> None:
    shape = mlp("gated", [1, 5], 0)
    net = trained(shape, "8bit")
    (group,) = trained_groups(net, mlp("gated", [3], 0).selection, "frozen")
    assert group["neurons"] == [[1]] and "rows" not in group
    assert [name for name, param in net.named_parameters() if param.requires_grad] == ["down.delta"]
    net = net_of(shape, "4bit")
    attach_deltas(net, shape.selection)
    columns, rows = trained_groups(net, mlp("gated", [3], 0).selection, "frozen", units=True)
    assert (columns["neurons"], rows["neurons"]) == ([[1]], [None, None])
    assert rows["rows"] and rows["neuron_dim"] == 0


def test_a_float_down_projection_goes_with_codes_that_make_its_neurons() -> None:
    shape = mlp("gated", [1, 5], 0)
    net = net_of(shape, "8bit")
    decoded = nn.Linear(NUM_NEURONS, D_MODEL)
    decoded.weight.data.copy_(decoded_weight(net.down))
    net.down = copy.deepcopy(decoded)
    groups = trained_groups(net, shape.selection, "frozen", units=True)
    assert [len(group["params"]) for group in groups] == [1, 2]
    assert all(each is layer.delta for each, layer in zip(groups[1]["params"], (net.gate, net.up), strict=True))
    net = net_of(shape, "8bit")
    net.down = decoded
    with pytest.raises(ValueError, match=r"layer 'gate' holds torch.int8 codes, .* torch_simu.deltas.trained_groups"):
        shape.selection.param_groups(net, units=True)


class TestRefusals:
    def test_neurons_that_something_else_makes_and_nothing_is_attached(self) -> None:
        net = net_of(mlp("gated", [1], 0), "8bit")
        net.forward = lambda x: MlpNet.forward(net, x) + net.down(torch.sigmoid(x[..., :NUM_NEURONS]))
        net.layout = "plain"
        with pytest.raises(ValueError, match="neurons of layer 'down' are not proved to be made by the rows"):
            attach_deltas(net, mlp("gated", [1], 0).selection, units=True)
        assert not attached_layers(net)

    def test_a_selection_of_another_model(self) -> None:
        net = net_of(mlp("gated", [1], 0), "8bit")
        for use in (attach_deltas, widen_deltas):
            with pytest.raises(ValueError, match="Layer 'down' has 32 neurons, the selection counts 8"):
                use(net, NeuronSelection({"down": [1]}, {"down": 8}), units=True)
            with pytest.raises(KeyError, match="Layer 'nowhere' is not in the model"):
                use(net, NeuronSelection({"nowhere": [1]}, {"nowhere": 8}), units=True)
            with pytest.raises(TypeError, match="selection is a dict, expected a NeuronSelection"):
                use(net, {"down": [1]}, units=True)
        assert not attached_layers(net)

    def test_a_layer_for_columns_and_for_rows(self) -> None:
        net, sizes = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"0": 4, "1": 4}
        both = NeuronSelection({"0": [1]}, sizes), NeuronSelection({"0": [1]}, sizes)
        with pytest.raises(ValueError, match="Layer '0' has selected neurons and makes selected neurons of another"):
            attach_places(net, *both)
        attach_places(net, NOTHING, both[1])
        with pytest.raises(ValueError, match="The delta of layer '0' is of rows, expected one of columns. Call merge"):
            widen_deltas(net, both[0])
        detach_deltas(net)
        with pytest.raises(ValueError, match="Layer '0' has 4 outputs, the rows of its delta are of 6"):
            attach_places(net, NOTHING, NeuronSelection({"0": [1]}, {"0": 6}))
        assert not attached_layers(net)
