"""A second request trains its own neurons beside what the first one changed, which stays as it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.deltas.test_deltas import KINDS, SIZE, WIDTH, bits, frozen_bits, neurons
from tests.strategies import normal, seeds
from torch_simu import NeuronSelection, SIMUOptimizer, attach_deltas, detach_deltas
from torch_simu.deltas import attached_layers, widen_deltas
from torch_simu.deltas.trained import trained_groups
from torch_simu.layers import is_neuron_layer

pytestmark = pytest.mark.usefixtures("device")


def selected(chosen: set[int]) -> NeuronSelection:
    return NeuronSelection({"0": chosen}, {"0": SIZE})


def trained(kind: str, chosen: set[int], seed: int) -> nn.Module:
    """A layer whose delta of the chosen neurons is not zero."""
    model = nn.Sequential(KINDS[kind](seed))
    delta = attach_deltas(model, selected(chosen))["0"]
    with torch.no_grad():
        delta.copy_(normal(seed + 2, *delta.shape))
    return model


def columns(model: nn.Module) -> dict[int, bytes]:
    layer = attached_layers(model)["0"]
    return {neuron: bits(layer.delta[:, place]) for place, neuron in enumerate(layer.idx.tolist())}


def assert_the_first_request_outlives_the_second(kind: str, first: set[int], second: set[int], seed: int) -> None:
    """Laws 1 and 8, over two requests."""
    model, x = trained(kind, first, seed), normal(seed + 3, 5, SIZE)
    codes, before, output = frozen_bits(model[0]), columns(model), model(x).detach()
    optimizer = SIMUOptimizer(trained_groups(model, selected(second), "frozen"), lr=0.1, weight_decay=0.1)
    zero = bits(torch.zeros(WIDTH))
    assert columns(model) == {neuron: before.get(neuron, zero) for neuron in sorted(first | second)}
    torch.testing.assert_close(model(x), output, rtol=1e-5, atol=1e-5 * output.abs().max().item())
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    after = columns(model)
    assert {neuron: after[neuron] for neuron in first - second} == {key: before[key] for key in first - second}
    assert all(after[neuron] != before.get(neuron, zero) for neuron in second)
    state = [value for entry in optimizer.state.values() for value in entry.values() if value.dim()]
    assert all(value.shape == (WIDTH, len(second)) for value in state)
    assert frozen_bits(model[0]) == codes


@given(st.sampled_from(list(KINDS)), neurons, neurons, seeds)
def test_what_was_forgotten_first_stays_forgotten_to_the_last_bit(
    kind: str, first: set[int], second: set[int], seed: int
) -> None:
    assert_the_first_request_outlives_the_second(kind, first, second, seed)


def test_the_law_tells_a_request_that_trains_the_whole_union(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_simu.deltas import trained as module

    whole = lambda model, _: {name: layer.delta for name, layer in attached_layers(model).items()}  # noqa: E731

    def trains_all(model: nn.Module, selection: NeuronSelection, rows: NeuronSelection) -> dict[str, nn.Parameter]:
        assert not rows
        widen_deltas(model, selection)
        layer = attached_layers(model)["0"]
        selection._indices["0"] = tuple(layer.idx.tolist())
        return whole(model, selection)

    monkeypatch.setattr(module, "widen_places", trains_all)
    with pytest.raises(AssertionError):
        assert_the_first_request_outlives_the_second("8bit", {1, 5}, {3}, 0)


def test_a_selection_within_the_first_changes_nothing() -> None:
    model = trained("linear", {1, 5}, 0)
    delta = attached_layers(model)["0"].delta
    assert widen_deltas(model, selected({5}))["0"] is delta
    assert trained_groups(model, selected({1, 5}), "frozen")[0]["neurons"] == [None]
    assert trained_groups(model, selected({5}), "frozen")[0]["neurons"] == [[1]]


def test_layers_without_a_delta_get_one_and_those_outside_the_selection_are_held() -> None:
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))
    attach_deltas(model, selected({1}))
    second = NeuronSelection({"1": [2]}, {"0": SIZE, "1": SIZE})
    assert list(widen_deltas(model, second)) == ["1"]
    (group,) = trained_groups(model, second, "frozen")
    assert group["params"] == [attached_layers(model)["1"].delta]
    assert [name for name, param in model.named_parameters() if param.requires_grad] == ["1.delta"]
    detach_deltas(model)
    assert all(type(layer) is nn.Linear and is_neuron_layer(layer) for layer in model)


def test_a_selection_of_another_model_is_refused_and_changes_nothing() -> None:
    model = trained("linear", {1, 5}, 0)
    before = columns(model)
    with pytest.raises(ValueError, match="Layer '0' has 64 neurons, the selection counts 8"):
        widen_deltas(model, NeuronSelection({"0": [1]}, {"0": 8}))
    with pytest.raises(TypeError, match="selection is a dict, expected a NeuronSelection"):
        widen_deltas(model, {"0": [1]})
    with pytest.raises(KeyError, match="Layer '7' is not in the model"):
        widen_deltas(model, NeuronSelection({"0": [2], "7": [1]}, {"0": SIZE, "7": SIZE}))
    assert columns(model) == before
