"""Approximate attribution of all layers at once: scale every layer at all positions along one common path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from torch_simu.attribution.intervention import recorded_inputs, replaced_input
from torch_simu.attribution.padded import PaddedRows, padded_rows
from torch_simu.attribution.path import Path
from torch_simu.attribution.rows import Row
from torch_simu.attribution.sums import LayerSum, attributed, scaled


def joint_sums(
    model: nn.Module, rows: Sequence[Row], layers: Mapping[str, nn.Module], path: Path
) -> Iterator[tuple[str, LayerSum]]:
    """Yield a rough sum of each layer; the error reported for each is that of all layers together.

    Args:
        model: A causal language model, frozen.
        rows: Sequences with samples.
        layers: Name -> module.
        path: Objective and path points.
    """
    totals = {name: torch.zeros((), dtype=torch.float64) for name in layers}
    change = 0.0
    for padded in padded_rows(model, rows, path.steps):
        with recorded_inputs(dict(layers)) as clean, torch.no_grad():
            change += padded.values(model, 1, path).double().sum().item()
        with torch.no_grad():
            values, _ = _joint_values(model, layers, padded, clean, [0.0], path)
        change -= values.double().sum().item()
        for alphas in padded.split(path.alphas):
            values, leaves = _joint_values(model, layers, padded, clean, alphas, path)
            gradients = torch.autograd.grad(values.sum(), list(leaves.values()))
            for name, gradient in zip(leaves, gradients, strict=True):
                totals[name] = totals[name] + attributed(gradient, clean[name])
    scores = {name: total / path.steps for name, total in totals.items()}
    error = sum(score.sum().item() for score in scores.values()) - change
    for name in layers:
        yield name, LayerSum(scores[name], error)


def _joint_values(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    padded: PaddedRows,
    clean: Mapping[str, Tensor],
    alphas: list[float],
    path: Path,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return F of each path point and sample, and the scaled activations of each layer."""
    count, length = padded.ids.shape
    leaves = {name: scaled(clean[name], alphas) for name in layers}
    with ExitStack() as stack:
        for name, module in layers.items():

            def replace(_: Tensor, name: str = name) -> Tensor:
                return leaves[name].reshape(len(alphas) * count, length, -1)

            stack.enter_context(replaced_input(name, module, len(alphas) * count, length, replace))
        values = padded.values(model, len(alphas), path)
    return values, leaves
