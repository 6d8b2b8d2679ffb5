"""The oracle of whitened units: each parameter by dense inverses of the covariances of both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.optimizer.units.mlps import Mlp
from tests.strategies import Options, normal
from torch_simu import SIMUOptimizer, register_neuron_hooks
from torch_simu.hooks import NeuronHooks
from torch_simu.layers import sources_beside

DAMPING = 0.1


class DenseSides:
    """One parameter whose selected entries step by dense inverses of the covariances of both sides.

    Args:
        weight: Outputs first, `(num_outputs, num_inputs)`; of a bias `(num_outputs,)`, which nothing whitens.
        outputs: The rows that train; None: all.
        inputs: The columns that train; None: all.
        sides: Which sides are whitened: "outputs", "inputs".
    """

    def __init__(
        self, weight: Tensor, outputs: list[int] | None, inputs: list[int] | None, sides: list[str], options: Options
    ) -> None:
        self.weight, self.options = weight.clone(), options
        self.outputs = list(range(weight.shape[0])) if outputs is None else outputs
        self.inputs = list(range(weight.shape[-1])) if inputs is None else inputs
        self.m = torch.zeros_like(self.part(weight))
        self.covariances: dict[str, Tensor] = dict.fromkeys(sides) if weight.dim() == 2 else {}
        self.norm: Tensor | None = None

    def part(self, matrix: Tensor) -> Tensor:
        """The entries that train."""
        return matrix[self.outputs][:, self.inputs] if matrix.dim() == 2 else matrix[self.outputs]

    def refresh(self, x: Tensor, gradient: Tensor) -> None:
        """Average the covariances over positions that a gradient of the outputs reached."""
        reached = [position for position in range(len(gradient)) if gradient[position].abs().sum() > 0]
        seen = {"inputs": x[:, self.inputs] if self.covariances else x, "outputs": gradient[:, self.outputs]}
        for side, before in self.covariances.items():
            found = sum(torch.outer(seen[side][each], seen[side][each]) for each in reached) / len(reached)
            if side == "outputs":
                found = found / found.diagonal().mean()
            beta2 = self.options.beta2
            self.covariances[side] = found if before is None else beta2 * before + (1 - beta2) * found
        # What has no covariance is not seen again.
        if self.covariances or self.norm is None:
            self.norm = self.part(self.weight).norm()

    def whitened(self, grad: Tensor) -> Tensor:
        """The gradient of the entries that train, times the inverses."""
        found = self.part(grad)
        for side, each in self.covariances.items():
            damped = each + DAMPING * each.diagonal().mean() * torch.eye(len(each), dtype=each.dtype)
            found = torch.linalg.inv(damped) @ found if side == "outputs" else found @ torch.linalg.inv(damped)
        return found

    def step(self, grad: Tensor) -> None:
        """One update of momentum and weight."""
        o, found = self.options, self.whitened(grad)
        self.m = o.beta1 * self.m + (1 - o.beta1) * found / found.norm()
        moved = self.part(self.weight) * (1 - o.lr * o.weight_decay) - o.lr * self.norm * self.m
        if self.weight.dim() == 1:
            self.weight[self.outputs] = moved
            return
        rows = self.weight[self.outputs]
        rows[:, self.inputs] = moved
        self.weight[self.outputs] = rows


class Run:
    """An MLP, an optimizer on its units, and the oracle of each parameter that trains."""

    def __init__(
        self,
        implementation: Callable[..., SIMUOptimizer],
        mlp: Mlp,
        options: Options,
        curvature: str,
        dtype: torch.dtype = torch.float64,
        **extra: Any,
    ) -> None:
        self.mlp, self.both, self.net = mlp, curvature == "both", mlp.make(dtype)
        self.sources = sources_beside(self.net, ["down"])["down"]
        self.optimizer = implementation(
            mlp.selection.param_groups(self.net, units=True),
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            hessian_interval=options.interval,
            curvature=curvature,
            **extra,
        )
        chosen, size = list(mlp.neurons), mlp.num_neurons
        rows = chosen + [size + each for each in chosen] if mlp.layout == "fused" else chosen
        self.oracles = {
            "down.weight": DenseSides(
                self.weight("down.weight"), None, chosen, ["inputs", "outputs"] if self.both else ["inputs"], options
            )
        }
        for name, _ in self.net.named_parameters():
            if not name.startswith("down"):
                sides = ["outputs", "inputs"] if self.both else ["inputs"]
                self.oracles[name] = DenseSides(self.weight(name), rows, None, sides, options)

    def weight(self, name: str, *, grad: bool = False) -> Tensor:
        """A parameter or its gradient in float64, outputs first."""
        param = self.net.get_parameter(name)
        found = (param.grad if grad else param.detach()).double()
        return found.T.clone() if self.mlp.layout == "conv" and found.dim() == 2 else found.clone()

    def hooks(self) -> NeuronHooks:
        """Hooks that see what the curvature needs, and no more."""
        layers = {"down": self.mlp.selection["down"]} | {
            source.name: torch.arange(self.mlp.width) for source in self.sources
        }
        chosen = self.mlp.selection["down"].tolist()
        outputs = {source.name: torch.tensor(source.rows(chosen)) for source in self.sources} if self.both else False
        return register_neuron_hooks(self.net, layers, reduce="covariance", outputs=outputs, accum_dtype=torch.float64)

    def backward(self, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Leave gradients of two rows of five positions, of which no last one is scored, and say what layers met.

        Returns:
            Layer -> (its inputs, the gradient of its outputs), position by position.
        """
        met: dict[str, tuple[Tensor, Tensor]] = {}
        names = ["down", *(source.name for source in self.sources)]

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
                output.retain_grad()
                met[name] = (args[0].detach(), output)

            return hook

        handles = [self.net.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        dtype = self.net.down.weight.dtype
        x, factor = normal(seed, 2, 5, self.mlp.width), normal(seed + 1, 2, 5, self.mlp.width)
        factor[:, -1] = 0
        self.net.zero_grad()
        (self.net(x.to(dtype)) * factor.to(dtype)).sum().backward()
        for handle in handles:
            handle.remove()
        return {
            name: (inputs.flatten(0, 1).double(), output.grad.flatten(0, 1).double())
            for name, (inputs, output) in met.items()
        }

    def train(self, seed: int, start: int, stop: int) -> None:
        """Steps `start` to `stop`, with refreshes where they are due."""
        for number in range(start, stop):
            with self.hooks() as hooks:
                met = self.backward(seed + 2 * number)
            if self.optimizer.hessian_due:
                self.optimizer.update_curvature(hooks)
                for name, oracle in self.oracles.items():
                    oracle.refresh(*met[name.rpartition(".")[0]])
            for name, oracle in self.oracles.items():
                oracle.step(self.weight(name, grad=True))
            self.optimizer.step()


def steps_match_dense_inverses(
    implementation: Callable[..., SIMUOptimizer],
    mlp: Mlp,
    options: Options,
    seed: int,
    curvature: str,
    **extra: Any,
) -> None:
    """Law 3: columns, rows and biases step as dense inverses say."""
    run = Run(implementation, mlp, options, curvature, state_dtype=torch.float64, **extra)
    run.train(seed, 0, 4)
    for name, oracle in run.oracles.items():
        torch.testing.assert_close(run.weight(name), oracle.weight, rtol=1e-7, atol=1e-10)
