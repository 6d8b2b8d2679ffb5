"""Approximate attribution: scale one layer, or all layers together, at all positions at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from torch_simu.attribution.methods.memory import Memory
from torch_simu.attribution.methods.padded import PaddedSequences, padded_sequences
from torch_simu.attribution.methods.sums import LayerSum, path_sums
from torch_simu.attribution.path import Path
from torch_simu.attribution.sequences import ScoredSequence
from torch_simu.attribution.site import Site


def layerwise_sums(
    model: nn.Module, sequences: Sequence[ScoredSequence], layers: Mapping[str, nn.Module], path: Path, memory: Memory
) -> Iterator[tuple[str, LayerSum]]:
    """Yield an approximate sum of each layer: complete along its own path, which changes all positions together.

    Args:
        model: A causal language model, frozen.
        sequences: Sequences with samples.
        layers: Name -> module.
        path: Objective and path points.
        memory: What one pass may take.
    """
    for name, module in layers.items():
        yield from _together(model, sequences, {name: module}, path, memory)


def joint_sums(
    model: nn.Module, sequences: Sequence[ScoredSequence], layers: Mapping[str, nn.Module], path: Path, memory: Memory
) -> Iterator[tuple[str, LayerSum]]:
    """Yield a rough sum of each layer, all on one path; the error reported for each is that of all together.

    Args:
        model: A causal language model, frozen.
        sequences: Sequences with samples.
        layers: Name -> module.
        path: Objective and path points.
        memory: What one pass may take.
    """
    yield from _together(model, sequences, layers, path, memory)


def _together(
    model: nn.Module, sequences: Sequence[ScoredSequence], layers: Mapping[str, nn.Module], path: Path, memory: Memory
) -> Iterator[tuple[str, LayerSum]]:
    sums: list[dict[str, LayerSum]] = []
    for padded in padded_sequences(model, sequences, path.steps, memory):
        clean = None
        if len(layers) > 1:
            # A layer above a scaled one sees its effect: each is scaled from what it gets in a clean pass.
            with torch.no_grad():
                _, clean = _values(model, layers, padded, None, path, [1.0])
        sums.append(path_sums(model, partial(_values, model, layers, padded, clean, path), path, padded.chunks))
    for name in layers:
        yield name, sum((each[name] for each in sums[1:]), start=sums[0][name])


def _values(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    padded: PaddedSequences,
    clean: Mapping[str, Site] | None,
    path: Path,
    alphas: list[float],
    _: slice = slice(None),
) -> tuple[Tensor, dict[str, Site]]:
    """Return F of each path point and sample, of all layers together, and the scaled layers."""
    count, length = padded.ids.shape
    sites = {}
    with ExitStack() as stack:
        for name, module in layers.items():
            sites[name] = Site(
                name,
                module,
                len(alphas) * count,
                length,
                alphas,
                pick=lambda whole: whole[:count],
                place=lambda leaf, _: leaf.flatten(0, 1),
                clean=None if clean is None else clean[name],
            )
            stack.enter_context(sites[name].scaled())
        values = padded.values(model, len(alphas), path)[:, None]
    return values, sites
