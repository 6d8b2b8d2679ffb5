"""The laws of the optimizer as functions of an implementation, so that the mutants can be shown to break them."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference import DenseMaskedSophia
from tests.strategies import Layer, Options, normal
from torch_simu import SIMUOptimizer

Implementation = Callable[..., SIMUOptimizer]


def make(
    implementation: Implementation, layer: Layer, options: Options, dtype: torch.dtype = torch.float32, **extra: Any
) -> tuple[nn.Parameter, SIMUOptimizer]:
    """A parameter and an optimizer on the layer's selected neurons."""
    param = nn.Parameter(layer.weight(dtype))
    group = {"params": [param], "neurons": [list(layer.neurons)], "neuron_dim": layer.dim}
    optimizer = implementation(
        [group],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        rho=options.rho,
        weight_decay=options.weight_decay,
        clip=options.clip,
        hessian_interval=options.interval,
        **extra,
    )
    return param, optimizer


def train(param: nn.Parameter, optimizer: SIMUOptimizer, seed: int, start: int, stop: int) -> None:
    """Steps `start` to `stop` with gradients drawn from the seed, a learning rate that changes, and refreshes."""
    base = optimizer.defaults["lr"]
    for number in range(start, stop):
        optimizer.param_groups[0]["lr"] = base / (1 + number)
        param.grad = normal(seed + 2 * number, *param.shape, dtype=param.dtype)
        optimizer.step()
        if optimizer.hessian_due:
            param.grad = normal(seed + 2 * number + 1, *param.shape, dtype=param.dtype)
            optimizer.update_hessian(7)


def bits(tensor: Tensor) -> Tensor:
    """The raw bytes, so that NaN and signed zeros count as themselves."""
    return tensor.detach().contiguous().view(torch.uint8) if tensor.dim() else tensor


def unselected_weights_stay(
    implementation: Implementation, layer: Layer, options: Options, dtype: torch.dtype, seed: int, **extra: Any
) -> None:
    """Law 1: after any number of steps and a reload, what is not selected is bit-identical."""
    param, optimizer = make(implementation, layer, options, dtype, **extra)
    before = param.detach().clone()
    train(param, optimizer, seed, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    train(param, optimizer, seed, 3, 5)
    assert torch.equal(param[~layer.mask()].view(-1), before[~layer.mask()].view(-1))
    assert torch.equal(bits(torch.where(layer.mask(), 0, param)), bits(torch.where(layer.mask(), 0, before)))


def state_is_compact(implementation: Implementation, layer: Layer, options: Options, seed: int, **extra: Any) -> None:
    """Law 2: momentum and curvature hold as many entries as are selected, and nothing else holds any."""
    param, optimizer = make(implementation, layer, options, **extra)
    train(param, optimizer, seed, 0, 2)
    entries = [value for value in optimizer.state[param].values() if isinstance(value, Tensor) and value.dim()]
    assert [value.numel() for value in entries] == [layer.width * len(layer.neurons)] * 2


def steps_match_the_reference(
    implementation: Implementation, layer: Layer, options: Options, seed: int, **extra: Any
) -> None:
    """Law 3: every step is that of dense Sophia, masked; none selected changes nothing, all selected is dense."""
    param, optimizer = make(implementation, layer, options, torch.float64, state_dtype=torch.float64, **extra)
    oracle = DenseMaskedSophia(param.detach(), layer.mask(), options)
    for number in range(5):
        grad = normal(seed + 2 * number, *param.shape, dtype=torch.float64)
        param.grad = grad.clone()
        optimizer.step()
        oracle.step(grad)
        if number % options.interval == 0:
            assert optimizer.hessian_due
            grad = normal(seed + 2 * number + 1, *param.shape, dtype=torch.float64)
            param.grad = grad.clone()
            optimizer.update_hessian(7)
            oracle.refresh(grad, 7)
        assert not optimizer.hessian_due
    torch.testing.assert_close(param.detach(), oracle.weight, rtol=1e-9, atol=1e-12)


def steps_are_bounded(
    implementation: Implementation, layer: Layer, options: Options, seed: int, size: float, **extra: Any
) -> None:
    """Law 4, first half: without decay no entry moves farther than lr times clip."""
    param, optimizer = make(implementation, layer, options, **extra)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for number in range(3):
        before = param.detach().clone()
        param.grad = size * normal(seed + number, *param.shape)
        optimizer.step()
        assert (param - before).abs().le(options.lr * options.clip * (1 + 1e-4) + 1e-6 * before.abs()).all()


def non_finite_gradients_change_nothing(
    implementation: Implementation, layer: Layer, options: Options, seed: int, bad: float, **extra: Any
) -> None:
    """Law 4, second half: one non-finite selected entry leaves weights and state as they were, and it is counted."""
    param, optimizer = make(implementation, layer, options, **extra)
    train(param, optimizer, seed, 0, 3)
    weight, state = param.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    for refresh in (False, True):
        grad = normal(seed, *param.shape)
        grad[layer.mask().nonzero()[0].unbind()] = bad
        param.grad = grad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.update_hessian(7) if refresh else optimizer.step()
    assert torch.equal(param, weight)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[0][key], state[0][key]) for key in ("step", "exp_avg", "hessian"))
    assert optimizer.diagnostics()["skipped_steps"] == 2


def reload_continues_identically(
    implementation: Implementation, layer: Layer, options: Options, dtype: torch.dtype, seed: int, **extra: Any
) -> None:
    """Law 5: saved at any step and loaded into a fresh optimizer, the run goes on bit for bit, state dtype kept."""
    param, optimizer = make(implementation, layer, options, dtype, **extra)
    train(param, optimizer, seed, 0, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin, resumed = make(implementation, layer, options, dtype, **extra)
    with torch.no_grad():
        twin.copy_(param)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for key, value in optimizer.state[param].items():
        assert resumed.state[twin][key].dtype == value.dtype
    train(param, optimizer, seed, 3, 6)
    train(twin, resumed, seed, 3, 6)
    assert torch.equal(bits(param), bits(twin))
    assert all(torch.equal(resumed.state[twin][key], value) for key, value in optimizer.state[param].items())
