"""A network that uses its down projection in every way, and the capture of it without hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.strategies import float_dtypes, normal, seeds
from torch_simu.hooks import register_neuron_hooks

Pairs = dict[str, list[Tensor]]

Edge = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """How a network uses its down projection."""

    batch: int
    num_tokens: int
    d_model: int
    d_ff: int
    dtype: torch.dtype
    consumers: bool
    twice: bool
    keyword: bool
    frozen: bool
    checkpointing: str
    seed: int

    def network(self) -> Net:
        """A network of these sizes, with weights made of the seed."""
        return Net(self)

    def inputs(self, number: int = 0) -> Tensor:
        """The `number`-th batch."""
        x = normal(self.seed + 17 + number, self.batch, self.num_tokens, self.d_model, dtype=self.dtype)
        return x.requires_grad_(self.checkpointing == "reentrant")


class Net(nn.Module):
    """An MLP whose hidden activation may have other consumers, and whose down projection may be called twice."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.up = nn.Linear(case.d_model, case.d_ff, dtype=case.dtype)
        self.down = nn.Linear(case.d_ff, case.d_model, bias=False, dtype=case.dtype)
        for number, param in enumerate(self.parameters()):
            param.data.copy_(normal(case.seed + number, *param.shape))
        self.requires_grad_(not case.frozen)

    def forward(self, x: Tensor, edge: Edge = lambda tensor: tensor) -> Tensor:
        if self.case.checkpointing == "off":
            return self.body(x, edge)
        return checkpoint(self.body, x, edge, use_reentrant=self.case.checkpointing == "reentrant")

    def body(self, x: Tensor, edge: Edge) -> Tensor:
        hidden = torch.tanh(self.up(x))
        out = self.down(input=edge(hidden)) if self.case.keyword else self.down(edge(hidden))
        if self.case.twice:
            out = out + self.down(edge(hidden * 2))
        if self.case.consumers:
            out = out + 3 * hidden.sum(-1, keepdim=True)
        return out


cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    num_tokens=st.integers(1, 4),
    d_model=st.integers(1, 4),
    d_ff=st.integers(1, 6),
    dtype=float_dtypes,
    consumers=st.booleans(),
    twice=st.booleans(),
    keyword=st.booleans(),
    frozen=st.booleans(),
    checkpointing=st.sampled_from(["off", "reentrant", "non_reentrant"]),
    seed=seeds,
)
PLAIN = Case(2, 3, 2, 5, torch.float32, True, True, False, False, "off", 7)


def naive_capture(case: Case, number: int = 0, net: Net | None = None) -> tuple[Tensor, Tensor]:
    """Activations and gradients by a zero added on each edge into the layer, without hooks. Shape: `(-1, d_ff)`."""
    net = net or case.network()
    activations, zeros = [], []

    def edge(hidden: Tensor) -> Tensor:
        activations.append(hidden.detach().flatten(0, -2))
        zeros.append(torch.zeros_like(hidden, requires_grad=True))
        return hidden + zeros[-1]

    out = net.body(case.inputs(number), edge)
    gradients = torch.autograd.grad(loss_of(out), zeros)
    return torch.cat(activations), torch.cat([gradient.flatten(0, -2) for gradient in gradients])


def loss_of(out: Tensor) -> Tensor:
    return out.float().square().sum()


def captured(net: Net, number: int = 0) -> Tensor:
    """Activations and gradients of the down projection, by hooks."""
    with register_neuron_hooks(net, "down", reduce=None) as hooks:
        loss_of(net(net.case.inputs(number))).backward()
    return hooks["down"]


@contextmanager
def retained(module: nn.Module, names: list[str]) -> Iterator[Pairs]:
    """Inputs of layers and their `.grad`, which is right where nothing else uses that input."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def pre_hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].retain_grad()
            kept[name].append(args[0])

        return pre_hook

    handles = [module.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    pairs: Pairs = {}
    yield pairs
    for handle in handles:
        handle.remove()
    for name, inputs in kept.items():
        found = [tensor.detach() for tensor in inputs], [tensor.grad for tensor in inputs]
        pairs[name] = [torch.cat([tensor.flatten(0, -2) for tensor in tensors]) for tensors in found]
