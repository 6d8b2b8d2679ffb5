"""On a GPU a step is captured and replayed, waits for nothing, and holds little more than the selected columns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.devices.recording import no_waiting, peak_bytes, recorded
from tests.strategies import generator, normal
from torch_simu import NeuronSelection, SIMUOptimizer, attach_deltas, gauss_newton_loss, register_neuron_hooks

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("placed")]

OPTIONS = {
    "plain": {},
    "loop": {"foreach": False, "weight_decay": 0.1},
    "foreach": {"foreach": True, "weight_decay": 0.1},
    "squared gradient": {"curvature": "squared_gradient", "hessian_interval": 3, "rho": 10.0},
    "stochastic rounding": {"stochastic_rounding": True},
    "master weights": {"master_weights": True},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
}
DTYPES = (torch.float32, torch.bfloat16)


def make(dtype: torch.dtype, **options: object) -> tuple[list[nn.Parameter], SIMUOptimizer]:
    """Columns, rows, a whole weight, and fused experts, with gradients whose addresses stay."""
    shapes = ((4, 6), (5, 3), (3,), (2, 3, 4))
    weights = [nn.Parameter(normal(number, *shape, dtype=dtype)) for number, shape in enumerate(shapes)]
    groups = [
        {"params": weights[:1], "neurons": [[0, 2, 5]]},
        {"params": weights[1:2], "neurons": [[1, 4]], "neuron_dim": 0},
        {"params": weights[2:3]},
        {"params": weights[3:], "neurons": [[1, 2, 7]], "neuron_dim": (0, 2)},
    ]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    return weights, SIMUOptimizer(groups, **{"lr": 0.01, "rho": 1.0, "hessian_interval": 2, **options})


def fill(weights: list[nn.Parameter], number: int, bad: bool = False) -> None:
    for place, weight in enumerate(weights):
        weight.grad.copy_(normal(100 * number + place, *weight.shape, dtype=weight.dtype))
    if bad:
        weights[0].grad[0, 2] = math.nan


@pytest.mark.filterwarnings("ignore:Selected gradients were not finite:RuntimeWarning")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_step_and_refresh_do_what_eager_ones_do(gpu, options, dtype):
    runs = [make(dtype, capturable=True, **options) for _ in range(2)]
    refreshed = "curvature" not in options
    (weights, eager), (replayed, captured) = runs

    def both(number: int, step, refresh, bad: bool = False) -> None:
        for each in (weights, replayed):
            fill(each, number, bad)
        eager.step()
        step()
        if refreshed and eager.hessian_due:
            eager.update_hessian(3)
            refresh()

    # A capture needs the state and the indices on the device, and kernels that were loaded.
    for number in range(3):
        both(number, captured.step, lambda: captured.update_hessian(3))
    step = refresh = None
    for each in (weights, replayed):
        fill(each, 3)
    eager.step()
    step = recorded(gpu, captured.step)
    if refreshed:
        eager.update_hessian(3)
        refresh = recorded(gpu, lambda: captured.update_hessian(3))
    for number in range(4, 10):
        both(number, step, refresh, bad=number in (5, 8))
        assert all(torch.equal(one, other) for one, other in zip(weights, replayed, strict=True))
    for one, other in zip(weights, replayed, strict=True):
        assert all(torch.equal(value, captured.state[other][key]) for key, value in eager.state[one].items())
    assert captured.diagnostics()["skipped_steps"] >= 2


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_and_a_refresh_do_not_wait_for_the_device(gpu, options, dtype):
    weights, optimizer = make(dtype, **options)

    def once() -> None:
        optimizer.step()
        if "curvature" not in options:
            optimizer.update_hessian(3)

    for number in range(2):
        fill(weights, number)
        once()
    with no_waiting(gpu):
        once()
    assert all(weight.isfinite().all() for weight in weights)


@pytest.mark.parametrize("reduce", ["attribution", "act", "grad", "sq", "covariance"])
def test_a_pass_with_hooks_and_deltas_does_not_wait_for_the_device(gpu, reduce):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    deltas = attach_deltas(model, NeuronSelection({"2": [1, 4]}, {"2": 6}))
    optimizer = SIMUOptimizer(deltas.values(), lr=0.1)
    inputs = normal(0, 3, 5, 4)

    def once() -> None:
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.update_hessian(3)

    with register_neuron_hooks(model, "2", reduce=reduce) as hooks:
        once()
        with no_waiting(gpu):
            once()
    assert hooks["2"].device.type == gpu.type
    assert deltas["2"].any()


@pytest.mark.parametrize(("foreach", "all_layers", "largest_layer"), [(True, 5.5, 0), (False, 1, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_holds_the_selected_columns_a_few_times_over_and_never_a_layer(
    gpu, foreach, all_layers, largest_layer, dtype
):
    d_model, d_ff, chosen, layers = 256, 8192, 64, 4
    weights = [nn.Parameter(torch.zeros(d_model, d_ff, dtype=dtype)) for _ in range(layers)]
    for number, weight in enumerate(weights):
        weight.grad = normal(number, d_model, 1, dtype=dtype).expand(d_model, d_ff).contiguous()
    neurons = [torch.randperm(d_ff, generator=generator(n))[:chosen].tolist() for n in range(layers)]
    group = {"params": weights, "neurons": neurons}
    # What decides on the device, as on a GPU.
    optimizer = SIMUOptimizer([group], foreach=foreach, capturable=True)
    columns = 4 * d_model * chosen
    optimizer.step()
    optimizer.update_hessian(5)
    state = [each for kept in optimizer.state.values() for each in kept.values() if isinstance(each, Tensor)]
    assert sum(each.nbytes for each in state if each.dim()) == 2 * layers * columns
    held = peak_bytes(gpu, optimizer.step)
    assert held <= (all_layers * layers + largest_layer) * columns
    # Less than one dense layer in the weights' dtype, however many layers train.
    assert held < weights[0].nbytes


def test_labels_are_sampled_where_the_logits_are(gpu):
    logits = normal(0, 6, 9).requires_grad_()
    labels = torch.tensor([0, 1, -100, 3, 4, 5])
    loss, num_tokens = gauss_newton_loss(logits, labels)
    loss.backward()
    assert int(num_tokens) == 5
    assert logits.grad.device.type == gpu.type
    assert logits.grad.any(-1).nonzero()[:, 0].tolist() == [0, 1, 3, 4, 5]
