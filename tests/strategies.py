"""What the property tests draw: sizes, dtypes, selections and seeds; tensors come from a generator made of the seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

seeds = st.integers(0, 2**31 - 1)
float_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def generator(seed: int) -> torch.Generator:
    """A generator made of a drawn seed."""
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A normal tensor made of a drawn seed."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Options:
    """Hyper-parameters of the step."""

    lr: float
    beta1: float
    beta2: float
    rho: float
    weight_decay: float
    clip: float
    interval: int


options = st.builds(
    Options,
    lr=st.sampled_from([1e-3, 0.05, 0.5]),
    beta1=st.sampled_from([0.0, 0.5, 0.965]),
    beta2=st.sampled_from([0.0, 0.9, 0.99]),
    rho=st.sampled_from([0.04, 1.0, 10.0]),
    weight_decay=st.sampled_from([0.0, 0.1, 1.0]),
    clip=st.sampled_from([0.5, 1.0, 3.0]),
    interval=st.integers(1, 4),
)


@dataclass(frozen=True)
class Layer:
    """A weight with neurons along `dim`: columns of a Linear layer (-1) or rows of GPT-2's Conv1D (0)."""

    num_neurons: int
    width: int
    dim: int
    contiguous: bool
    neurons: tuple[int, ...]
    seed: int

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The initial weight."""
        shape = (self.width, self.num_neurons) if self.dim == -1 else (self.num_neurons, self.width)
        values = normal(self.seed, *shape, dtype=dtype)
        return values if self.contiguous else values.t().contiguous().t()

    def mask(self) -> Tensor:
        """True at every selected entry of the weight."""
        mask = torch.zeros(self.num_neurons, dtype=torch.bool)
        mask[list(self.neurons)] = True
        return (mask[None, :] if self.dim == -1 else mask[:, None]).expand_as(self.weight())


@st.composite
def layers(draw: st.DrawFn, fully: bool = False) -> Layer:
    """A layer and a selection of its neurons: any subset, none and all among them."""
    size = draw(st.integers(1, 9))
    chosen = range(size) if fully else draw(st.sets(st.integers(0, size - 1)))
    return Layer(
        num_neurons=size,
        width=draw(st.integers(1, 6)),
        dim=draw(st.sampled_from([-1, 0])),
        contiguous=draw(st.booleans()),
        neurons=tuple(sorted(chosen)),
        seed=draw(seeds),
    )
