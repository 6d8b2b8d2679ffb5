"""The whitened step is that of dense inverses on selected columns, and every law of the optimizer holds for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.optimizer.whitened import whitened
from tests.optimizer.whitened.whitened import OPTIONS, small
from tests.strategies import Layer, Options, float_dtypes, layers, normal, options, seeds
from torch_simu import NeuronSelection, SIMUOptimizer, attach_deltas, register_neuron_hooks
from torch_simu.hooks import NeuronHookError

pytestmark = pytest.mark.usefixtures("device")

DEVICE = st.sampled_from([{}, {"capturable": True}])
CURVATURES = st.sampled_from(["neurons", "both"])
chosen_layers = layers().filter(lambda layer: bool(layer.neurons))


@given(chosen_layers, options, seeds, CURVATURES, DEVICE)
def test_a_step_is_that_of_dense_inverses(
    layer: Layer, options: Options, seed: int, curvature: str, extra: dict[str, Any]
) -> None:
    whitened.steps_match_dense_inverses(SIMUOptimizer, layer, options, seed, curvature, **extra)


@given(layers(), options, float_dtypes, seeds, CURVATURES, DEVICE)
def test_unselected_weights_are_bit_identical(
    layer: Layer, options: Options, dtype: torch.dtype, seed: int, curvature: str, extra: dict[str, Any]
) -> None:
    whitened.unselected_weights_stay(SIMUOptimizer, layer, options, dtype, seed, curvature=curvature, **extra)


@given(chosen_layers, options, seeds, CURVATURES, DEVICE)
def test_the_state_is_compact(layer: Layer, options: Options, seed: int, curvature: str, extra: dict[str, Any]) -> None:
    whitened.state_is_compact(SIMUOptimizer, layer, options, seed, curvature, **extra)


@given(chosen_layers, options, seeds, DEVICE)
def test_a_layer_moves_at_most_by_the_step_size_as_a_share_of_its_norm(
    layer: Layer, options: Options, seed: int, extra: dict[str, Any]
) -> None:
    whitened.steps_are_bounded(SIMUOptimizer, layer, options, seed, **extra)


@given(chosen_layers, options, seeds, st.sampled_from([float("nan"), float("inf")]), DEVICE)
def test_numbers_that_are_not_finite_change_nothing(
    layer: Layer, options: Options, seed: int, bad: float, extra: dict[str, Any]
) -> None:
    whitened.non_finite_numbers_change_nothing(SIMUOptimizer, layer, options, seed, bad, **extra)


@given(chosen_layers, options, float_dtypes, seeds, CURVATURES, DEVICE)
def test_a_reload_continues_bit_by_bit(
    layer: Layer, options: Options, dtype: torch.dtype, seed: int, curvature: str, extra: dict[str, Any]
) -> None:
    whitened.reload_continues_identically(SIMUOptimizer, layer, options, dtype, seed, curvature=curvature, **extra)


def test_hooks_that_see_more_neurons_than_train_give_the_same_step() -> None:
    weights = []
    for select in (None, "down", NeuronSelection({"down": [0, 1, 3, 4]}, {"down": 6})):
        run = whitened.Run(SIMUOptimizer, small(), OPTIONS)
        with run.hooks(select) as hooks:
            run.backward(7)
        run.optimizer.update_curvature(hooks)
        run.optimizer.step()
        weights.append(run.net.down.weight.detach())
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("curvature", ["neurons", "both"])
def test_deltas_take_the_steps_of_the_weights(dim: int, curvature: str) -> None:
    layer = small(dim=dim)
    plain = Options(lr=0.05, beta1=0.5, beta2=0.9, rho=1.0, weight_decay=0.0, clip=1.0, interval=2)
    run = whitened.Run(SIMUOptimizer, layer, plain, torch.float32, curvature)
    beside = whitened.Run(SIMUOptimizer, layer, plain, torch.float32, curvature)
    deltas = attach_deltas(beside.net, beside.selection)
    beside.optimizer = SIMUOptimizer(
        deltas.values(), lr=0.05, betas=(0.5, 0.9), hessian_interval=2, curvature=curvature
    )
    for number in range(4):
        for each in (run, beside):
            with each.hooks() as hooks:
                each.backward(2 * number)
            if each.optimizer.hessian_due:
                each.optimizer.update_curvature(hooks)
            each.optimizer.step()
    change = run.weight().detach() - layer.weight().T if dim == 0 else run.weight().detach() - layer.weight()
    torch.testing.assert_close(deltas["down"].detach(), change[:, list(layer.neurons)], rtol=1e-4, atol=1e-6)


def test_several_calls_of_hooks_add_up() -> None:
    run, parts = (whitened.Run(SIMUOptimizer, small(), OPTIONS) for _ in range(2))
    x, factor = normal(1, 4, 5, 6).double(), normal(2, 4, 5, 3).double()
    for each, batches in ((run, [slice(0, 4)]), (parts, [slice(0, 1), slice(1, 4)])):
        with each.hooks() as hooks:
            for rows in batches:
                (each.net(x[rows]) * factor[rows]).sum().backward()
        each.optimizer.update_curvature(hooks)
        each.optimizer.step()
    torch.testing.assert_close(run.net.down.weight, parts.net.down.weight, rtol=1e-10, atol=1e-12)


def test_a_changed_selection_needs_a_new_refresh_and_goes_on() -> None:
    run = whitened.Run(SIMUOptimizer, small(), OPTIONS)
    run.train(0, 0, 2)
    kept = run.optimizer.state[run.net.down.weight]["exp_avg"][:, 1].clone()
    run.selection = NeuronSelection({"down": [2, 4, 5]}, {"down": 6})
    run.optimizer.change_selection(run.selection, run.net)
    assert run.optimizer.hessian_due
    assert torch.equal(run.optimizer.state[run.net.down.weight]["exp_avg"][:, 1], kept)
    run.backward(9)
    with pytest.raises(RuntimeError, match="curvature 'neurons' was never refreshed for these neurons"):
        run.optimizer.step()
    before = run.net.down.weight.detach().clone()
    with run.hooks() as hooks:
        run.backward(9)
    run.optimizer.update_curvature(hooks)
    run.optimizer.step()
    assert (run.net.down.weight != before).any(0).nonzero()[:, 0].tolist() == [2, 4, 5]


def test_a_refresh_is_due_before_the_first_step_and_then_every_interval() -> None:
    run, due = whitened.Run(SIMUOptimizer, small(), OPTIONS), []
    for number in range(5):
        due.append(run.optimizer.hessian_due)
        run.train(0, number, number + 1)
    assert due == [True, False, True, False, True]


class TestErrors:
    def test_hooks_of_another_kind_are_refused(self) -> None:
        run = whitened.Run(SIMUOptimizer, small(), OPTIONS)
        with register_neuron_hooks(run.net, run.selection) as hooks:
            run.backward(0)
        with pytest.raises(ValueError, match='keep no covariance, expected hooks that do. .*reduce="covariance"'):
            run.optimizer.update_curvature(hooks)
        with pytest.raises(TypeError, match="hooks is of type dict"):
            run.optimizer.update_curvature({})

    def test_outputs_are_asked_for(self) -> None:
        run = whitened.Run(SIMUOptimizer, small(), OPTIONS, curvature="both")
        with register_neuron_hooks(run.net, run.selection, reduce="covariance") as hooks:
            run.backward(0)
        with pytest.raises(ValueError, match="keep no covariance of the outputs"):
            run.optimizer.update_curvature(hooks)
        with pytest.raises(ValueError, match="outputs is given with reduce='act'"):
            register_neuron_hooks(run.net, reduce="act", outputs=True)

    def test_a_layer_without_a_hook_is_named_by_its_shape(self) -> None:
        net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
        selection = NeuronSelection({"0": [1], "1": [0, 3]}, {"0": 4, "1": 5})
        optimizer = SIMUOptimizer(selection.param_groups(net), curvature="neurons")
        with register_neuron_hooks(net, ["1"], reduce="covariance") as hooks:
            net(torch.ones(3, 4)).sum().backward()
        with pytest.raises(ValueError, match=r"No hook sees the layer of a parameter that trains, of shape \(5, 4\)"):
            optimizer.update_curvature(hooks)

    def test_other_neurons_are_refused(self) -> None:
        run = whitened.Run(SIMUOptimizer, small(), OPTIONS)
        with run.hooks(NeuronSelection({"down": [1, 2]}, {"down": 6})) as hooks:
            run.backward(0)
        with pytest.raises(ValueError, match="layer 'down' see 2 neurons, and not all that train"):
            run.optimizer.update_curvature(hooks)

    def test_hooks_that_saw_nothing_are_refused(self) -> None:
        run = whitened.Run(SIMUOptimizer, small(), OPTIONS)
        with pytest.raises(NeuronHookError, match="Layer 'down' was never called"):
            run.optimizer.update_curvature(run.hooks())

    def test_a_step_before_the_first_refresh_is_refused(self) -> None:
        run = whitened.Run(SIMUOptimizer, small(), OPTIONS)
        run.backward(0)
        with pytest.raises(RuntimeError, match=r"never refreshed .* update_curvature\(hooks\) before the first step"):
            run.optimizer.step()

    def test_no_group_with_such_a_curvature(self) -> None:
        run = whitened.Run(SIMUOptimizer, small(), OPTIONS, curvature="gnb")
        with pytest.raises(ValueError, match="no group has curvature 'neurons' or 'both'"):
            run.optimizer.update_curvature(run.hooks())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"state_dtype": torch.uint8}, "state_dtype is torch.uint8 with curvature 'neurons'"),
            ({"damping": 0.0}, "damping is 0.0"),
        ],
    )
    def test_options_that_cannot_be(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SIMUOptimizer([nn.Parameter(torch.zeros(2, 2))], curvature="neurons", **options)

    def test_weights_of_more_dimensions_are_refused(self) -> None:
        with pytest.raises(ValueError, match="has 3 dimensions, expected weights of linear layers"):
            SIMUOptimizer([nn.Parameter(torch.zeros(2, 2, 2))], curvature="both")

    def test_state_of_another_size_is_refused(self) -> None:
        run, other = (whitened.Run(SIMUOptimizer, small(), OPTIONS) for _ in range(2))
        run.train(0, 0, 1)
        saved = run.optimizer.state_dict()
        saved["state"][0]["neuron_factor"] = torch.eye(3)
        with pytest.raises(ValueError, match=r"neuron_factor of parameter 0 has shape \(3, 3\), expected \(2, 2\)"):
            other.optimizer.load_state_dict(saved)
