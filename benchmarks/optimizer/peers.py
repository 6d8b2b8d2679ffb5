"""The optimizers that are measured side by side, each as a step on the same layers with the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_simu import SIMUOptimizer

Step = Callable[[], object]
UNLIMITED = 10**9
"""An interval between refreshes of the curvature that never ends: steps alone are measured."""


@dataclass(frozen=True)
class Size:
    """Down projections of a model: their shape and number, and how many a CPU run takes."""

    d_model: int
    d_ff: int
    layers: int
    cpu_layers: int


SIZES = {
    "bar": Size(1024, 4096, 4, 4),
    "demo": Size(96, 1536, 2, 2),
    "olmo_1b": Size(2048, 8192, 16, 2),
    "llama2_7b": Size(4096, 11008, 32, 1),
}


class Problem:
    """Weights with gradients, and some selected neurons of each layer."""

    def __init__(self, size: Size, layers: int, fraction: float, device: str, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(0)
        self.count = max(1, round(fraction * size.d_ff))
        self.chosen = [
            torch.randperm(size.d_ff, generator=draw)[: self.count].sort().values.to(device) for _ in range(layers)
        ]
        shape = (size.d_model, size.d_ff)
        self.weights = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02) for _ in range(layers)]
        for weight in self.weights:
            weight.grad = torch.randn_like(weight) * 1e-3

    @property
    def selected(self) -> int:
        """Entries that train."""
        return sum(weight.shape[0] * self.count for weight in self.weights)

    def neurons(self) -> list[list[int]]:
        """As the optimizer's groups take them."""
        return [chosen.tolist() for chosen in self.chosen]


def ours(problem: Problem) -> Optimizer:
    """SIMUOptimizer on dense gradients."""
    group = {"params": problem.weights, "neurons": problem.neurons()}
    return SIMUOptimizer([group], lr=1e-4, hessian_interval=UNLIMITED)


def ours_compact(problem: Problem) -> Optimizer:
    """SIMUOptimizer on parameters that hold the selected columns only, as deltas beside a frozen layer do."""
    deltas = []
    for weight, chosen in zip(problem.weights, problem.chosen, strict=True):
        delta = nn.Parameter(torch.zeros(weight.shape[0], problem.count, device=weight.device))
        delta.grad = weight.grad.index_select(-1, chosen).float()
        deltas.append(delta)
    return SIMUOptimizer(deltas, lr=1e-4, hessian_interval=UNLIMITED)


def ours_fused(problem: Problem) -> Optimizer:
    """SIMUOptimizer on dense gradients, by one Triton kernel a weight; on CUDA only."""
    group = {"params": problem.weights, "neurons": problem.neurons()}
    return SIMUOptimizer([group], lr=1e-4, hessian_interval=UNLIMITED, fused=True)


class DenseMaskedSophia(Optimizer):
    """SOUL's arithmetic (momentum twice, curvature at every step) with a mask on the update, over whole tensors."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.weights, {"lr": 1e-4})
        for weight, chosen in zip(problem.weights, problem.chosen, strict=True):
            mask = torch.zeros_like(weight)
            mask[:, chosen] = 1
            zeros = [torch.zeros_like(weight, dtype=torch.float32) for _ in range(2)]
            self.state[weight] = {"mask": mask, "exp_avg": zeros[0], "hessian": zeros[1]}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        for weight, state in self.state.items():
            grad, m, h = weight.grad.float() * state["mask"], state["exp_avg"], state["hessian"]
            h.mul_(0.99).addcmul_(grad, grad, value=0.01)
            for _ in range(2):
                m.mul_(0.965).add_(grad, alpha=0.035)
            ratio = (m.abs() / (0.04 * 5120 * h + 1e-15)).clamp(None, 1)
            weight.addcmul_((m.sign() * state["mask"]).to(weight.dtype), ratio.to(weight.dtype), value=-1e-4)


def adamw(problem: Problem) -> Optimizer:
    """The fused AdamW of torch on the same layers whole."""
    return torch.optim.AdamW(problem.weights, lr=1e-4, fused=True)


def adamw_8bit(problem: Problem) -> Optimizer:
    """AdamW of bitsandbytes with 8-bit state."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(problem.weights, lr=1e-4)


def sophia_h(problem: Problem) -> Optimizer:
    """SophiaH of pytorch_optimizer, without its Hutchinson pass after the first step."""
    from pytorch_optimizer import SophiaH

    optimizer = SophiaH(problem.weights, lr=1e-4, update_period=UNLIMITED)
    grads = [weight.grad for weight in problem.weights]
    # Its first step always makes the pass, for which the gradient needs a graph.
    for weight in problem.weights:
        weight.grad = torch.autograd.grad(weight.square().sum(), weight, create_graph=True)[0]
    optimizer.step()
    for weight, grad in zip(problem.weights, grads, strict=True):
        weight.grad = grad
    return optimizer


PEERS: dict[str, Callable[[Problem], Optimizer]] = {
    "simu": ours,
    "simu_compact": ours_compact,
    "dense_masked_sophia": DenseMaskedSophia,
    "adamw_fused": adamw,
    "pytorch_optimizer_sophia_h": sophia_h,
    "bitsandbytes_adamw8bit": adamw_8bit,
}

FOREIGN = ("pytorch_optimizer_sophia_h", "bitsandbytes_adamw8bit")
"""Peers of packages that may be missing, or lack a kernel for the device."""


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of tensors in the state, without the counters."""
    tensors = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim()
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def limits(problem: Problem) -> dict[str, Step]:
    """Physical limits: a copy of the bytes of a step, and the gathering and scattering of scattered columns alone."""
    compact = [torch.zeros(weight.shape[0], problem.count, device=weight.device) for weight in problem.weights]
    # A step reads weight, gradient, momentum and curvature and writes weight and momentum: three copies.
    sources = [[torch.zeros_like(each) for _ in range(3)] for each in compact]
    pairs = list(zip(problem.weights, problem.chosen, strict=True))

    def copy() -> None:
        for each, three in zip(compact, sources, strict=True):
            for source in three:
                each.copy_(source)

    @torch.no_grad()
    def columns() -> None:
        for weight, chosen in pairs:
            weight.index_add_(-1, chosen, weight.grad.index_select(-1, chosen))

    @torch.no_grad()
    def whole() -> None:
        # The cache lines of scattered columns are, at a few percent, most of the layer.
        for weight in problem.weights:
            weight.copy_(weight.grad)

    return {"limit_copy_of_the_bytes": copy, "limit_columns_alone": columns, "limit_copy_of_the_layers": whole}
