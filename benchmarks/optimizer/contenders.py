"""The steps that take turns in `benchmarks.optimizer.steps`: ours, other optimizers, and adapters of PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.optimizer.peers import (
    UNLIMITED,
    DenseMaskedSophia,
    Problem,
    Step,
    adamw,
    adamw_8bit,
    ours,
    ours_compact,
)
from torch_simu import NeuronSelection, SIMUOptimizer, register_neuron_hooks

POSITIONS = 512
"""Positions of the batch that the covariances are of."""


def by_covariances(problem: Problem) -> Optimizer:
    """SIMUOptimizer by the covariances of neurons and outputs, refreshed once, as the method `simu` has it."""
    layers = nn.ModuleDict()
    for number, weight in enumerate(problem.weights):
        layers[str(number)] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layers[str(number)].weight = weight
    chosen = {str(number): each.tolist() for number, each in enumerate(problem.chosen)}
    selection = NeuronSelection(chosen, dict.fromkeys(chosen, problem.weights[0].shape[1]))
    group = {"params": problem.weights, "neurons": problem.neurons()}
    optimizer = SIMUOptimizer([group], lr=1e-6, hessian_interval=UNLIMITED, curvature="both")
    kept = [weight.grad for weight in problem.weights]
    draw = torch.Generator().manual_seed(1)
    with register_neuron_hooks(layers, selection, reduce="covariance", outputs=True) as hooks:
        for layer in layers.values():
            layer(torch.randn(POSITIONS, layer.weight.shape[1], generator=draw)).square().sum().backward()
        for weight, grad in zip(problem.weights, kept, strict=True):
            weight.grad = grad
        optimizer.update_curvature(hooks)
    return optimizer


class LeanMaskedSophia(DenseMaskedSophia):
    """Sophia's own arithmetic over whole tensors with a mask, in place and with one buffer; curvature at refreshes."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._buffer = torch.empty_like(problem.weights[0])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; from zero state a masked update is the same as masked momentum."""
        for weight, state in self.state.items():
            buffer = torch.mul(state["hessian"], 0.04, out=self._buffer).clamp_(min=1e-12)
            state["exp_avg"].lerp_(weight.grad, 0.035)
            torch.div(state["exp_avg"], buffer, out=buffer).clamp_(-1, 1)
            weight.addcmul_(buffer, state["mask"], value=-1e-4)


def _sophia_(weight: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor, mask: Tensor) -> None:
    exp_avg.lerp_(grad, 0.035)
    weight.add_((exp_avg / (0.04 * hessian).clamp(min=1e-12)).clamp(-1, 1) * mask, alpha=-1e-4)


def lean_compiled(problem: Problem) -> Step:
    """The same arithmetic, which the compiler fuses into one pass."""
    step, states = torch.compile(_sophia_, dynamic=False), LeanMaskedSophia(problem).state

    @torch.no_grad()
    def call() -> None:
        for weight, state in states.items():
            step(weight.detach(), weight.grad, state["exp_avg"], state["hessian"], state["mask"])

    return call


def ours_compiled(problem: Problem) -> Step:
    """SIMUOptimizer on dense gradients, its whole step compiled into one graph."""
    group = {"params": problem.weights, "neurons": problem.neurons()}
    optimizer = SIMUOptimizer([group], lr=1e-4, hessian_interval=UNLIMITED, capturable=True)
    # What makes the state is no part of the graph.
    optimizer.step()
    return torch.compile(optimizer.step, fullgraph=True)


def compact_compiled(problem: Problem) -> Step:
    """The same on parameters that hold the selected columns only."""
    optimizer = ours_compact(problem)
    optimizer.param_groups[0]["capturable"] = True
    optimizer.step()
    return torch.compile(optimizer.step, fullgraph=True)


def muon(problem: Problem) -> Optimizer:
    """The Muon of torch on the same layers whole."""
    return torch.optim.Muon(problem.weights, lr=1e-4)


def _adapter(problem: Problem, kind: str) -> list[nn.Parameter]:
    """The parameters of an adapter with as many numbers as the selected columns have, with gradients."""
    import peft

    layers = nn.ModuleDict()
    for number, weight in enumerate(problem.weights):
        layers[f"down{number}"] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layers[f"down{number}"].weight = nn.Parameter(weight.detach(), requires_grad=False)
    rank = max(1, round(problem.weights[0].shape[0] * problem.count / sum(problem.weights[0].shape)))
    config = {"lora": peft.LoraConfig, "shira": peft.ShiraConfig}[kind](r=rank, target_modules=list(layers))
    made = peft.get_peft_model(layers, config)
    params = [param for param in made.parameters() if param.requires_grad]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def _adamw(params: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, fused=True)


def lora_8bit(problem: Problem) -> Optimizer:
    """LoRA's matrices under 8-bit AdamW."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(_adapter(problem, "lora"), lr=1e-4)


def copy_of_the_layers(problem: Problem) -> Step:
    """A copy of the gradients onto the weights, which is as fast as memory: from it comes the limit."""

    @torch.no_grad()
    def copy() -> None:
        for weight in problem.weights:
            weight.copy_(weight.grad)

    return copy


CONTENDERS: Mapping[str, Callable[[Problem], Optimizer | Step]] = MappingProxyType(
    {
        "simu_graddiff": ours,
        "simu_graddiff, compiled": ours_compiled,
        "simu_graddiff on deltas": ours_compact,
        "simu_graddiff on deltas, compiled": compact_compiled,
        "simu, by covariances": by_covariances,
        "dense masked Sophia as SOUL publishes it": DenseMaskedSophia,
        "dense masked Sophia, lean": LeanMaskedSophia,
        "dense masked Sophia, lean, compiled": lean_compiled,
        "AdamW, fused": adamw,
        "AdamW, 8 bits": adamw_8bit,
        "Muon": muon,
        "LoRA, AdamW, fused": lambda problem: _adamw(_adapter(problem, "lora")),
        "LoRA, AdamW, 8 bits": lora_8bit,
        "SHiRA, AdamW, fused": lambda problem: _adamw(_adapter(problem, "shira")),
        "copy of the layers": copy_of_the_layers,
    }
)
"""Name -> what makes an optimizer, or a step."""

COPY = "copy of the layers"
OURS = "simu_graddiff"


def step_of(name: str, problem: Problem) -> Step:
    """The step of a contender."""
    made = CONTENDERS[name](problem)
    return made.step if isinstance(made, Optimizer) else made


def touched_bytes(problem: Problem, line: int = 64) -> int:
    """Bytes that a step moves at least: cache lines of selected columns, and the compact state.

    Of weight and gradient the lines are read, of the weight they are written too; momentum is read and written,
    curvature read.
    """
    total = 0
    for weight, chosen in zip(problem.weights, problem.chosen, strict=True):
        lines = torch.unique(chosen * weight.element_size() // line).numel()
        total += 3 * weight.shape[0] * lines * line + 3 * 4 * weight.shape[0] * len(chosen)
    return total
