"""Small MLPs whose neurons are made beside codes, and what their deltas hold."""

from __future__ import annotations

from hypothesis import strategies as st
from torch import nn

from tests.deltas.test_deltas import WIDTH, bits
from tests.optimizer.units.mlps import Mlp
from tests.quantized import quantized
from tests.strategies import normal
from torch_simu import attach_deltas
from torch_simu.deltas import attached_layers

# As wide as a block of 4-bit codes.
D_MODEL, NUM_NEURONS = 64, 32
outputs = st.sets(st.integers(0, WIDTH - 1), min_size=1)
chosen_neurons = st.sets(st.integers(0, NUM_NEURONS - 1), min_size=1)
coded = st.sampled_from(["8bit", "4bit"])
layouts = st.sampled_from(["plain", "gated", "fused"])


def mlp(layout: str, neurons: set[int] | list[int], seed: int, *, bias: bool = True) -> Mlp:
    return Mlp(layout, D_MODEL, NUM_NEURONS, bias, tuple(sorted(neurons)), seed)


def net_of(shape: Mlp, kind: str) -> nn.Module:
    net = shape.make()
    return net if kind == "float" else quantized(net, kind)


def rows_of(shape: Mlp) -> dict[str, list[int]]:
    """Projection -> the rows that make the chosen neurons."""
    chosen = list(shape.neurons)
    if shape.layout == "fused":
        return {"up": chosen + [NUM_NEURONS + each for each in chosen]}
    return dict.fromkeys(("gate", "up") if shape.layout == "gated" else ("up",), chosen)


def trained(shape: Mlp, kind: str) -> nn.Module:
    """A network whose deltas of columns and rows are not zero."""
    net = net_of(shape, kind)
    attach_deltas(net, shape.selection, units=True)
    for number, delta in enumerate(deltas_of(net).values()):
        delta.data.copy_(normal(shape.seed + number, *delta.shape))
    return net


def deltas_of(net: nn.Module) -> dict[str, nn.Parameter]:
    """Name of a delta, or that of a bias, in the network -> it."""
    return {
        f"{name}.{key}": delta for name, layer in attached_layers(net).items() for key, delta in layer.deltas().items()
    }


def held(net: nn.Module) -> dict[tuple[str, int], list[bytes]]:
    """(Layer, neuron or row) -> bits of its deltas."""
    return {
        (name, index): [bits(each[place] if layer.rows else each[:, place]) for each in layer.deltas().values()]
        for name, layer in attached_layers(net).items()
        for place, index in enumerate(layer.idx.tolist())
    }
