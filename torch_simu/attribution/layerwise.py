"""Approximate attribution, layer by layer: scale one layer at all positions at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from torch_simu.attribution.intervention import replaced_input
from torch_simu.attribution.padded import PaddedRows, padded_rows
from torch_simu.attribution.path import Path
from torch_simu.attribution.rows import Row
from torch_simu.attribution.sums import LayerSum, attributed, scaled


def layerwise_sums(
    model: nn.Module, rows: Sequence[Row], layers: Mapping[str, nn.Module], path: Path
) -> Iterator[tuple[str, LayerSum]]:
    """Yield an approximate sum of each layer: complete along its own path, which changes all positions together.

    Args:
        model: A causal language model, frozen.
        rows: Sequences with samples.
        layers: Name -> module.
        path: Objective and path points.
    """
    for name, module in layers.items():
        total = torch.zeros((), dtype=torch.float64)
        change = 0.0
        for padded in padded_rows(model, rows, path.steps):
            with torch.no_grad():
                ends, _, _ = _layer_values(model, name, module, padded, [0.0, 1.0], path)
            change += (ends[1] - ends[0]).double().sum().item()
            for alphas in padded.split(path.alphas):
                values, leaf, activation = _layer_values(model, name, module, padded, alphas, path)
                (gradient,) = torch.autograd.grad(values.sum(), leaf)
                total = total + attributed(gradient, activation)
        scores = total / path.steps
        yield name, LayerSum(scores, scores.sum().item() - change)


def _layer_values(
    model: nn.Module, name: str, module: nn.Module, padded: PaddedRows, alphas: list[float], path: Path
) -> tuple[Tensor, Tensor, Tensor]:
    """Return F of each path point and sample, the scaled activations, and the clean ones."""
    count, length = padded.ids.shape
    found: dict[str, Tensor] = {}

    def replace(activation: Tensor) -> Tensor:
        found["activation"] = activation[:count].detach()
        found["leaf"] = scaled(found["activation"], alphas)
        return found["leaf"].flatten(0, 1)

    with replaced_input(name, module, len(alphas) * count, length, replace):
        values = padded.values(model, len(alphas), path)
    return values, found["leaf"], found["activation"]
