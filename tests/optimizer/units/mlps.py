"""Small MLPs of every layout whose neurons train as units, with dense masks of what may change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.strategies import normal, seeds
from torch_simu import NeuronSelection

LAYOUTS = ("plain", "gated", "fused", "conv")


@dataclass(frozen=True)
class Mlp:
    """An MLP of one layout, and which of its neurons are selected."""

    layout: str
    width: int
    num_neurons: int
    bias: bool
    neurons: tuple[int, ...]
    seed: int

    @property
    def selection(self) -> NeuronSelection:
        """The neurons."""
        return NeuronSelection({"down": list(self.neurons)}, {"down": self.num_neurons})

    def make(self, dtype: torch.dtype = torch.float32) -> MlpNet:
        """The network, with weights made of the seed."""
        net = MlpNet(self).to(dtype)
        with torch.no_grad():
            for number, param in enumerate(net.parameters()):
                param.copy_(normal(self.seed + number, *param.shape))
        return net

    def masks(self) -> dict[str, Tensor]:
        """Parameter -> True at each entry of a selected unit, written out layout by layout."""
        size, chosen = self.num_neurons, list(self.neurons)
        one = torch.zeros(size, dtype=torch.bool)
        one[chosen] = True
        rows = torch.cat([one, one]) if self.layout == "fused" else one
        masks = {}
        for name, param in self.make().named_parameters():
            if name == "down.bias":
                masks[name] = torch.zeros(param.shape, dtype=torch.bool)
            elif name.endswith("bias"):
                masks[name] = rows
            elif (name == "down.weight") == (self.layout == "conv"):
                masks[name] = (one if name == "down.weight" else rows)[:, None].expand(param.shape)
            else:
                masks[name] = (one if name == "down.weight" else rows)[None, :].expand(param.shape)
        return masks


class MlpNet(nn.Module):
    """What `Mlp` describes."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        width, size, bias = mlp.width, mlp.num_neurons, mlp.bias
        self.layout = mlp.layout
        if mlp.layout == "conv":
            self.up: nn.Module = Conv1D(size, width)
            self.down: nn.Module = Conv1D(width, size)
            return
        if mlp.layout == "gated":
            self.gate: nn.Module = nn.Linear(width, size, bias=bias)
        self.up = nn.Linear(width, size * (2 if mlp.layout == "fused" else 1), bias=bias)
        self.down = nn.Linear(size, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """What the MLP returns."""
        if self.layout == "fused":
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.down(torch.nn.functional.silu(gate) * up)
        if self.layout == "gated":
            return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return self.down(torch.nn.functional.gelu(self.up(x)))


@st.composite
def mlps(draw: st.DrawFn, chosen: bool = False) -> Mlp:
    """An MLP and a selection of its neurons: any subset, none and all among them, or with `chosen` one at least."""
    size = draw(st.integers(1, 6))
    return Mlp(
        layout=draw(st.sampled_from(LAYOUTS)),
        width=draw(st.integers(2, 4)),
        num_neurons=size,
        bias=draw(st.booleans()),
        neurons=tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=int(chosen))))),
        seed=draw(seeds),
    )
