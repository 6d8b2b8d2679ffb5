"""The laws of the whitened step as functions of an implementation, on a layer that hooks see."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.reference import DenseWhitened
from tests.strategies import Layer, Options, normal
from torch_simu import NeuronSelection, SIMUOptimizer, register_neuron_hooks
from torch_simu.hooks import NeuronHooks

Implementation = Callable[..., SIMUOptimizer]
OPTIONS = Options(lr=0.05, beta1=0.5, beta2=0.9, rho=1.0, weight_decay=0.1, clip=0.5, interval=2)


def small(neurons: tuple[int, ...] = (1, 4), dim: int = -1) -> Layer:
    """A layer of six neurons."""
    return Layer(num_neurons=6, width=3, dim=dim, contiguous=True, neurons=neurons, seed=3)


class Net(nn.Module):
    """One layer with neurons."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        super().__init__()
        if layer.dim == -1:
            self.down: nn.Module = nn.Linear(layer.num_neurons, layer.width, bias=False, dtype=dtype)
        else:
            self.down = Conv1D(layer.width, layer.num_neurons).to(dtype)
        with torch.no_grad():
            self.down.weight.copy_(layer.weight(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """What the layer returns."""
        return self.down(x)


class Run:
    """A layer, an optimizer on its selected neurons and, as an oracle, the same with dense inverses."""

    def __init__(
        self,
        implementation: Implementation,
        layer: Layer,
        options: Options,
        dtype: torch.dtype = torch.float64,
        curvature: str = "neurons",
        **extra: Any,
    ) -> None:
        self.layer, self.options, self.both = layer, options, curvature == "both"
        self.net = Net(layer, dtype)
        self.selection = NeuronSelection({"down": list(layer.neurons)}, {"down": layer.num_neurons})
        self.optimizer = implementation(
            self.selection.param_groups(self.net),
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            hessian_interval=options.interval,
            curvature=curvature,
            **extra,
        )
        weight = self.weight().detach().to(torch.float64)
        self.oracle = DenseWhitened(weight, list(layer.neurons), options, outputs=self.both, damping=0.1)

    def weight(self) -> Tensor:
        """The weight as `(d_model, num_neurons)`."""
        return self.net.down.weight if self.layer.dim == -1 else self.net.down.weight.T

    def hooks(self, select: Any = None) -> NeuronHooks:
        """Hooks that see what the curvature needs."""
        chosen = self.selection if select is None else select
        return register_neuron_hooks(
            self.net, chosen, reduce="covariance", outputs=self.both, accum_dtype=torch.float64
        )

    def backward(self, seed: int, hooks: NeuronHooks | None = None) -> tuple[Tensor, Tensor]:
        """Leave a gradient of two rows of five positions, of which the last of each is not scored."""
        dtype = self.net.down.weight.dtype
        x, factor = normal(seed, 2, 5, self.layer.num_neurons), normal(seed + 1, 2, 5, self.layer.width)
        factor[:, -1] = 0
        self.net.zero_grad()
        (self.net(x.to(dtype)) * factor.to(dtype)).sum().backward()
        return x.flatten(0, 1).double(), factor.flatten(0, 1).double()

    def train(self, seed: int, start: int, stop: int) -> None:
        """Steps `start` to `stop`, with refreshes where they are due."""
        for number in range(start, stop):
            with self.hooks() as hooks:
                seen = self.backward(seed + 2 * number)
            if self.optimizer.hessian_due:
                self.optimizer.update_curvature(hooks)
                self.oracle.refresh(*seen)
            grad = self.net.down.weight.grad
            self.oracle.step((grad if self.layer.dim == -1 else grad.T).double())
            self.optimizer.step()


def steps_match_dense_inverses(
    implementation: Implementation, layer: Layer, options: Options, seed: int, curvature: str, **extra: Any
) -> None:
    """Law 3: a step is that of the dense inverses, on the selected columns."""
    run = Run(implementation, layer, options, curvature=curvature, state_dtype=torch.float64, **extra)
    run.train(seed, 0, 5)
    torch.testing.assert_close(run.weight().detach(), run.oracle.weight, rtol=1e-8, atol=1e-11)


def unselected_weights_stay(
    implementation: Implementation, layer: Layer, options: Options, dtype: torch.dtype, seed: int, **extra: Any
) -> None:
    """Law 1: what is not selected is bit-identical, also after a reload."""
    run = Run(implementation, layer, options, dtype, **extra)
    before = run.net.down.weight.detach().clone()
    if not layer.neurons:  # Hooks are on selected neurons, of which there are none.
        return
    run.train(seed, 0, 2)
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    run.train(seed, 2, 4)
    assert torch.equal(run.net.down.weight.detach()[~layer.mask()], before[~layer.mask()])


def state_is_compact(
    implementation: Implementation, layer: Layer, options: Options, seed: int, curvature: str, **extra: Any
) -> None:
    """Law 2: at most `k (d + k)` numbers and two scalars, and `d d` more where the outputs are whitened."""
    run = Run(implementation, layer, options, torch.float32, curvature, **extra)
    run.train(seed, 0, 2)
    size, width = len(layer.neurons), layer.width
    held = [value.numel() for value in run.optimizer.state[run.net.down.weight].values() if value.dim()]
    assert sum(held) == size * (width + size) + (width * width if run.both else 0)


def steps_are_bounded(implementation: Implementation, layer: Layer, options: Options, seed: int, **extra: Any) -> None:
    """Law 4, first half: without decay a step is at most `lr` times the norm of the selected weights."""
    run = Run(implementation, layer, options, **extra)
    run.optimizer.param_groups[0]["weight_decay"] = 0.0
    neurons = list(layer.neurons)
    for number in range(3):
        before = run.weight().detach()[:, neurons].clone()
        norm = before.norm()
        run.optimizer.param_groups[0]["next_refresh"] = 0
        run.train(seed, number, number + 1)
        assert (run.weight().detach()[:, neurons] - before).norm() <= options.lr * norm * (1 + 1e-9)


def non_finite_numbers_change_nothing(
    implementation: Implementation, layer: Layer, options: Options, seed: int, bad: float, **extra: Any
) -> None:
    """Law 4, second half: a gradient or an activation that is not finite leaves weights and state as they were."""
    run = Run(implementation, layer, options, **extra)
    run.train(seed, 0, 3)
    weight = run.net.down.weight.detach().clone()
    state = copy.deepcopy(run.optimizer.state_dict()["state"])
    with run.hooks() as hooks:
        x = normal(seed, 2, 5, layer.num_neurons).double()
        x[0, 0, layer.neurons[0]] = bad
        run.net.zero_grad()
        run.net(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        run.optimizer.update_curvature(hooks)
        run.optimizer.step()
    assert torch.equal(run.net.down.weight, weight)
    after = run.optimizer.state_dict()["state"]
    keys = ("step", "exp_avg", "neuron_factor")
    assert all(torch.equal(after[0][key], state[0][key]) for key in keys)
    assert run.optimizer.diagnostics()["skipped_steps"] == 2


def reload_continues_identically(
    implementation: Implementation, layer: Layer, options: Options, dtype: torch.dtype, seed: int, **extra: Any
) -> None:
    """Law 5: saved at any step and loaded into a fresh optimizer, the run goes on bit for bit."""
    run, other = (Run(implementation, layer, options, dtype, **extra) for _ in range(2))
    run.train(seed, 0, 3)
    other.net.load_state_dict(run.net.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert other.optimizer.hessian_due == run.optimizer.hessian_due
    for each in (run, other):
        each.oracle.refresh(torch.eye(layer.num_neurons).double(), torch.ones(layer.num_neurons, layer.width).double())
        each.train(seed, 3, 6)
    assert torch.equal(run.net.down.weight, other.net.down.weight)
