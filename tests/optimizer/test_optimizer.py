"""SIMUOptimizer takes clipped second-order steps on selected neurons, and touches and stores nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from tests import laws
from tests.strategies import Options, float_dtypes, layers, normal, options, seeds
from torch_simu import NeuronSelection, SIMUOptimizer

pytestmark = pytest.mark.usefixtures("device")

ways = st.sampled_from(
    [{}, {"foreach": True}, {"capturable": True}, {"stochastic_rounding": True}, {"master_weights": True}]
)
PLAIN = Options(lr=0.1, beta1=0.5, beta2=0.5, rho=1.0, weight_decay=0.1, clip=1.0, interval=2)


@given(layers(), options, float_dtypes, seeds, ways)
def test_unselected_weights_are_bit_identical_after_any_number_of_steps(layer, o, dtype, seed, way):
    laws.unselected_weights_stay(SIMUOptimizer, layer, o, dtype, seed, **way)


@given(layers(), options, seeds)
def test_unselected_neurons_have_no_optimizer_state(layer, o, seed):
    laws.state_is_compact(SIMUOptimizer, layer, o, seed)


@given(layers(), options, seeds, st.booleans())
def test_every_step_matches_dense_masked_sophia(layer, o, seed, foreach):
    laws.steps_match_the_reference(SIMUOptimizer, layer, o, seed, foreach=foreach)


@given(layers(fully=True), options, seeds)
def test_selecting_every_neuron_matches_the_dense_reference(layer, o, seed):
    laws.steps_match_the_reference(SIMUOptimizer, layer, o, seed)


@given(layers(fully=True), options, seeds)
def test_selecting_every_neuron_is_the_same_as_no_neurons_argument(layer, o, seed):
    one, first = laws.make(SIMUOptimizer, layer, o)
    two = nn.Parameter(layer.weight())
    second = SIMUOptimizer(
        [two],
        **{key: first.defaults[key] for key in ("lr", "betas", "rho", "weight_decay", "clip", "hessian_interval")},
    )
    laws.train(one, first, seed, 0, 4)
    laws.train(two, second, seed, 0, 4)
    assert torch.equal(one, two)


@given(layers(), options, seeds, st.randoms(use_true_random=False))
def test_order_and_duplicates_of_indices_do_not_matter(layer, o, seed, random):
    results = []
    for shuffled in (False, True):
        neurons = list(layer.neurons)
        if shuffled:
            neurons = neurons + neurons[:2]
            random.shuffle(neurons)
        param = nn.Parameter(layer.weight())
        optimizer = SIMUOptimizer([{"params": [param], "neurons": [neurons], "neuron_dim": layer.dim}], lr=o.lr)
        laws.train(param, optimizer, seed, 0, 3)
        results.append(param.detach())
    assert torch.equal(*results)


@given(layers(), options, seeds, st.sampled_from([1e-20, 1.0, 1e20]))
def test_no_entry_moves_farther_than_lr_times_clip(layer, o, seed, size):
    laws.steps_are_bounded(SIMUOptimizer, layer, o, seed, size)


@given(layers(), options, seeds, st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.booleans())
def test_a_non_finite_gradient_changes_nothing_and_is_counted(layer, o, seed, bad, capturable):
    assume(layer.neurons)
    laws.non_finite_gradients_change_nothing(SIMUOptimizer, layer, o, seed, bad, capturable=capturable)


def test_a_non_finite_gradient_is_said(device):
    param = nn.Parameter(torch.zeros(2))
    optimizer = SIMUOptimizer([param])
    param.grad = torch.tensor([1.0, float("nan")])
    if device.type == "cpu":
        with pytest.warns(RuntimeWarning, match=r"not finite; this step changed nothing \(1 so far\)"):
            optimizer.step()
        assert not optimizer.state
    else:
        # A step does not read the device.
        optimizer.step()
        with pytest.warns(RuntimeWarning, match="not finite; 1 steps or refreshes changed nothing"):
            assert not optimizer.hessian_due
    assert not param.any()


@given(layers(), options, float_dtypes, seeds, ways)
def test_a_reloaded_optimizer_continues_bit_identically(layer, o, dtype, seed, way):
    laws.reload_continues_identically(SIMUOptimizer, layer, o, dtype, seed, **way)


@given(layers(), seeds, float_dtypes)
def test_state_is_float32_whatever_the_weights(layer, seed, dtype):
    param, optimizer = laws.make(SIMUOptimizer, layer, PLAIN, dtype)
    laws.train(param, optimizer, seed, 0, 1)
    assert {optimizer.state[param][key].dtype for key in ("exp_avg", "hessian")} == {torch.float32}


@given(layers(), options, seeds)
def test_foreach_is_bit_equal_to_the_loop(layer, o, seed):
    results = []
    for foreach in (False, True):
        param, optimizer = laws.make(SIMUOptimizer, layer, o, foreach=foreach)
        laws.train(param, optimizer, seed, 0, 4)
        results.append(param.detach())
    assert torch.equal(*results)


@given(layers(), options, seeds)
def test_maximize_is_the_step_on_the_negated_gradient(layer, o, seed):
    up, ascending = laws.make(SIMUOptimizer, layer, o, maximize=True)
    down, descending = laws.make(SIMUOptimizer, layer, o)
    for number in range(3):
        up.grad = normal(seed + number, *up.shape)
        down.grad = -up.grad
        ascending.step()
        descending.step()
        for each in (ascending, descending):
            each.update_hessian(3)
    assert torch.equal(up, down)


@given(layers(), options, seeds, st.floats(0.5, 1024.0))
def test_grad_scale_undoes_the_scaling_of_the_loss(layer, o, seed, scale):
    states = []
    for factor in (None, scale):
        param, optimizer = laws.make(SIMUOptimizer, layer, o)
        param.grad = normal(seed, *param.shape) * (factor or 1.0)
        optimizer.update_hessian(5, grad_scale=factor)
        states.append(optimizer.state[param]["hessian"])
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("way", "low", "high"),
    [({}, 0.0, 0.0), ({"stochastic_rounding": True}, 0.9, 1.1), ({"master_weights": True}, 0.5, 1.5)],
)
def test_steps_below_the_spacing_of_bfloat16_survive_only_rounded_or_on_a_master_copy(way, low, high):
    param = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = SIMUOptimizer([param], lr=1e-4, hessian_interval=100, **way)
    for _ in range(70):
        param.grad = torch.ones_like(param)
        optimizer.step()
    realised = (1 - param.detach().float().mean().item()) / (70 * 1e-4)
    assert low <= realised <= high


def test_the_refresh_is_due_after_step_one_and_then_every_interval():
    param = nn.Parameter(torch.ones(1))
    optimizer = SIMUOptimizer([param], hessian_interval=3)
    due = []
    for number in range(1, 9):
        param.grad = torch.ones(1)
        optimizer.step()
        if optimizer.hessian_due:
            due.append(number)
            optimizer.update_hessian(1)
    assert due == [1, 4, 7]


def test_named_parameters_with_a_selection_train_the_selected_neurons_only():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    optimizer = SIMUOptimizer(model.named_parameters(), lr=0.1, selection=NeuronSelection({"1": [2]}, {"1": 3}))
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    changed = {name: (value != before[name]).nonzero().tolist() for name, value in model.state_dict().items()}
    assert changed == {"0.weight": [], "0.bias": [], "1.weight": [[0, 2], [1, 2]], "1.bias": []}


def test_parameters_without_gradient_are_skipped_and_empty_ones_are_fine():
    still, empty, moving = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2))
    optimizer = SIMUOptimizer([still, empty, moving], lr=0.1)
    empty.grad, moving.grad = torch.zeros(0, 3), torch.ones(2)
    optimizer.step()
    assert torch.equal(still, torch.ones(2)) and not torch.equal(moving, torch.ones(2))


def test_deepcopy_and_a_scheduler_work_as_on_any_optimizer():
    param = nn.Parameter(torch.ones(2))
    optimizer = SIMUOptimizer([param], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    param.grad = torch.ones(2)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert copy.deepcopy(optimizer).param_groups[0]["num_steps"] == 1


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    param = nn.Parameter(torch.ones(2))
    optimizer = SIMUOptimizer([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0


@pytest.mark.parametrize("capturable", [False, True])
def test_a_loop_that_never_refreshes_is_told_once(capturable):
    param = nn.Parameter(torch.zeros(2))
    optimizer = SIMUOptimizer([param], hessian_interval=2, capturable=capturable)

    def steps(number):
        for _ in range(number):
            param.grad = torch.ones(2)
            optimizer.step()

    steps(4)
    with pytest.warns(RuntimeWarning, match="The curvature was never refreshed in 5 steps") as caught:
        steps(10)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "options",
    [{"curvature": "squared_gradient"}, {"refresh": True}, {"loaded": True}, {"loaded": True, "capturable": True}],
)
def test_a_loop_that_refreshes_or_goes_on_from_one_that_did_is_not_told(options):
    options = dict(options)
    param, refresh, loaded = nn.Parameter(torch.zeros(2)), options.pop("refresh", False), options.pop("loaded", False)
    optimizer = SIMUOptimizer([param], hessian_interval=2, **options)
    for number in range(8):
        param.grad = torch.ones(2)
        optimizer.step()
        if (refresh or loaded) and number == 0:
            optimizer.update_hessian(1)
        if loaded and number == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_diagnostics_count_unclipped_entries():
    param = nn.Parameter(torch.zeros(2))
    optimizer = SIMUOptimizer([param], betas=(0.0, 0.0), rho=1.0)
    norms = {"momentum_norm": [0.0], "curvature_norm": [0.0]}
    assert optimizer.diagnostics() == {"unclipped": [None], **norms, "skipped_steps": 0}
    param.grad = torch.tensor([2.0, 2.0])
    optimizer.step()
    param.grad = torch.tensor([1.0, 2.0])
    optimizer.update_hessian(1)
    assert optimizer.diagnostics()["unclipped"] == [0.5]
