"""Units beside codes step as those of the decoded model, keep what was forgotten first, and are proved."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.deltas.rows.nets import (
    D_MODEL,
    NUM_NEURONS,
    chosen_neurons,
    coded,
    deltas_of,
    held,
    layouts,
    mlp,
    net_of,
    rows_of,
    trained,
)
from tests.optimizer.units.mlps import MlpNet
from tests.strategies import normal, seeds
from torch_simu import NeuronSelection, SIMUOptimizer, attach_deltas, detach_deltas
from torch_simu.bitsandbytes.layers import decoded_weight
from torch_simu.deltas import attached_layers, decode_model, trained_groups, widen_deltas
from torch_simu.deltas.attach import NOTHING, attach_places
from torch_simu.optimizer import covariance_hooks

pytestmark = pytest.mark.usefixtures("device")


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
    assert_steps_are_those_of_the_decoded_model(layout, kind, curvature)


def assert_steps_are_those_of_the_decoded_model(layout: str, kind: str, curvature: str) -> None:
    """Law 3, of weights and biases."""
    shape = mlp(layout, [1, 4, 30], 0)
    # In train mode 8 bits are computed with the decoded weight on a processor.
    net = net_of(shape, kind).train()
    dense = copy.deepcopy(net)
    decode_model(dense)
    before = {name: param.detach().clone() for name, param in dense.named_parameters()}
    steps(dense, shape.selection.param_groups(dense, units=True), curvature)
    steps(net, trained_groups(net, shape.selection, "frozen", units=True), curvature)
    changes = {name: param.detach() - before[name] for name, param in dense.named_parameters()}
    for name, layer in attached_layers(net).items():
        pairs = [(layer.change, layer.columns.gather(changes[f"{name}.weight"]))]
        if layer.rows:
            pairs.append((layer.delta_bias.detach(), changes[f"{name}.bias"][layer.idx]))
        for found, change in pairs:
            assert change.abs().max() > 1e-3
            torch.testing.assert_close(found, change, rtol=2e-2, atol=2e-3 * change.abs().max().item())


def _of_the_delta_alone(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda entry, trained=None, layers=(): original(entry)


def _without_the_bias(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda entry, trained=None, layers=(): original(entry, trained)


@pytest.mark.parametrize(("mutant", "module"), [(_of_the_delta_alone, "factors"), (_without_the_bias, "updates")])
def test_a_step_by_another_length_is_seen(
    mutant: Callable[..., Callable[..., Tensor]], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = importlib.import_module(f"torch_simu.optimizer.curvature.{module}")
    monkeypatch.setattr(target, "weight_norm", mutant(target.weight_norm))
    with pytest.raises(AssertionError):
        assert_steps_are_those_of_the_decoded_model("gated", "8bit", "both")


@given(layouts, st.sampled_from(["float", "8bit", "4bit"]), chosen_neurons, seeds)
def test_decoded_weights_have_the_change_in_columns_and_rows_and_nowhere_else(
    layout: str, kind: str, chosen: set[int], seed: int
) -> None:
    shape = mlp(layout, chosen, seed)
    base = net_of(shape, kind)
    decode_model(base)
    net = trained(shape, kind)
    deltas = {name: delta.detach() for name, delta in deltas_of(net).items()}
    decode_model(net)
    assert not attached_layers(net)
    wanted = {name: param.detach().clone() for name, param in base.named_parameters()}
    wanted["down.weight"][:, list(shape.neurons)] += deltas["down.delta"]
    for name, rows in rows_of(shape).items():
        wanted[f"{name}.weight"][rows] += deltas[f"{name}.delta"]
        wanted[f"{name}.bias"][rows] += deltas[f"{name}.delta_bias"]
    assert all(torch.equal(param, wanted[name]) for name, param in net.named_parameters())


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
    assert (columns["neurons"], rows["neurons"]) == ([[1]], [None] * 4)
    assert rows["rows"] and rows["neuron_dim"] == 0


def test_a_float_down_projection_goes_with_codes_that_make_its_neurons() -> None:
    shape = mlp("gated", [1, 5], 0)
    net = net_of(shape, "8bit")
    decoded = nn.Linear(NUM_NEURONS, D_MODEL)
    decoded.weight.data.copy_(decoded_weight(net.down))
    net.down = copy.deepcopy(decoded)
    groups = trained_groups(net, shape.selection, "frozen", units=True)
    wanted = [net.gate.delta, net.gate.delta_bias, net.up.delta, net.up.delta_bias]
    assert [id(param) for group in groups for param in group["params"]] == list(map(id, [net.down.delta, *wanted]))
    net = net_of(shape, "8bit")
    net.down = decoded
    with pytest.raises(ValueError, match=r"layer 'gate' holds torch.int8 codes, .* torch_simu.deltas.trained_groups"):
        shape.selection.param_groups(net, units=True)


class TestRefusals:
    def test_a_bias_that_two_layers_share(self) -> None:
        net = net_of(mlp("gated", [1], 0), "8bit")
        net.up.bias = net.gate.bias
        with pytest.raises(ValueError, match="Layers 'gate' and 'up' share one weight, expected a weight per layer"):
            attach_deltas(net, mlp("gated", [1], 0).selection, units=True)
        assert not attached_layers(net)

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

    def test_groups_of_weights_beneath_deltas_of_rows(self) -> None:
        shape = mlp("gated", [1], 0)
        net = trained(shape, "float")
        with pytest.raises(ValueError, match=r"Layer 'gate' has a delta, expected none. Train it: .*trained_groups"):
            shape.selection.param_groups(net, units=True)

    def test_deltas_of_rows_that_are_trained_as_columns(self) -> None:
        net = trained(mlp("gated", [1], 0), "8bit")
        groups = [{"params": [layer.delta for layer in attached_layers(net).values()]}]
        optimizer = SIMUOptimizer(groups, curvature="neurons")
        message = "selects outputs of layer 'gate'.* torch_simu.deltas.trained_groups, with units=True"
        with pytest.raises(ValueError, match=message):
            covariance_hooks(net, optimizer)

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
