"""Exact attribution by definition: one forward and backward pass per prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from torch_simu.attribution.methods.budget import Chunks
from torch_simu.attribution.methods.call import device_of, logits_at
from torch_simu.attribution.methods.memory import Memory
from torch_simu.attribution.methods.rows import Rows
from torch_simu.attribution.methods.sums import LayerSum, path_sums
from torch_simu.attribution.path import Path
from torch_simu.attribution.sequences import ScoredSequence
from torch_simu.attribution.site import Site

# A pass over few tokens waits for the weights: layers share it, although the gradient goes down to the lowest of them.
_FEW_TOKENS = 512


def prefix_sums(
    model: nn.Module, sequences: Sequence[ScoredSequence], layers: Mapping[str, nn.Module], path: Path, memory: Memory
) -> Iterator[tuple[str, LayerSum]]:
    """Yield the exact sum of each layer over all samples of the sequences, for any causal model.

    Args:
        model: A causal language model, frozen; only `input_ids` is passed to it.
        sequences: Sequences with samples. Prefixes of equal length share a pass.
        layers: Name -> module.
        path: Objective and path points.
        memory: What one pass may take.
    """
    groups = list(prefixes(sequences, device_of(model)))
    longest, most = max(ids.shape[1] for ids, _ in groups), max(len(ids) for ids, _ in groups)
    size = max(1, min(_FEW_TOKENS, memory.tokens) // (longest * most * (path.steps + 2)))
    names = list(layers)
    for start in range(0, len(names), size):
        band = {name: layers[name] for name in names[start : start + size]}
        sums: list[dict[str, LayerSum]] = []
        for ids, targets in groups:
            count, length = ids.shape
            values = partial(_prefix_values, model, band, ids, targets, path)
            points = max(1, min(path.steps + 2, memory.tokens // (len(band) * count * length)))
            chunks = Chunks(points, max(1, min(count, memory.tokens // (len(band) * points * length))))
            sums.append(path_sums(model, values, path, chunks, count))
        yield from ((name, sum((each[name] for each in sums[1:]), start=sums[0][name])) for name in band)


def prefix_rows(
    model: nn.Module, sequences: Sequence[ScoredSequence], _: Mapping[str, nn.Module], path: Path, memory: Memory
) -> Iterator[Rows]:
    """Yield the samples of the sequences for passes in which each is changed elsewhere; arguments of `prefix_sums`."""
    tokens = memory.tokens
    for ids, targets in prefixes(sequences, device_of(model)):
        count, length = ids.shape

        def values(part: slice, ids: Tensor = ids, targets: Tensor = targets) -> Tensor:
            last = torch.tensor([ids.shape[1] - 1], device=ids.device)
            logits = logits_at(model, last, input_ids=ids[part], use_cache=False)
            return path.values(logits[:, 0], targets[part])

        def grid(count: int, length: int = length) -> tuple[int, int]:
            return count, length

        def at(rows: Tensor, length: int = length) -> tuple[Tensor, Tensor]:
            return rows, torch.full_like(rows, length - 1)

        yield Rows(count, max(1, tokens // length), grid, at, values)


def prefixes(sequences: Sequence[ScoredSequence], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all prefixes, those of equal length together, as ids `(num_prefixes, length)` and targets."""
    groups: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for sequence in sequences:
        for query, target in zip(sequence.queries.tolist(), sequence.targets, strict=True):
            groups.setdefault(query + 1, []).append((sequence.ids[: query + 1], target))
    for length in sorted(groups):
        ids, targets = zip(*groups[length], strict=True)
        yield torch.stack(ids).to(device), torch.stack(targets).to(device)


def _prefix_values(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    ids: Tensor,
    targets: Tensor,
    path: Path,
    alphas: list[float],
    part: slice,
) -> tuple[Tensor, dict[str, Site]]:
    """Return F of each path point, layer and prefix, and the scaled layers: rows of its own change each layer."""
    ids, targets = ids[part], targets[part]
    (count, length), rows = ids.shape, len(alphas) * len(ids)
    sites = {}
    with ExitStack() as stack:
        for number, (name, module) in enumerate(layers.items()):
            pick = partial(_last_of, slice(number * rows, number * rows + count))
            place = partial(_last_replaced, slice(number * rows, (number + 1) * rows))
            sites[name] = Site(name, module, len(layers) * rows, length, alphas, pick, place)
            stack.enter_context(sites[name].scaled())
        last = torch.tensor([length - 1], device=ids.device)
        logits = logits_at(model, last, input_ids=ids.repeat(len(layers) * len(alphas), 1), use_cache=False)
    found = path.values(logits[:, 0].reshape(len(layers), len(alphas), count, -1), targets)
    return found.transpose(0, 1), sites


def _last_of(which: slice, whole: Tensor) -> Tensor:
    return whole[which, -1]


def _last_replaced(which: slice, leaf: Tensor, whole: Tensor) -> Tensor:
    last = torch.cat([whole[: which.start, -1], leaf.flatten(0, 1), whole[which.stop :, -1]])
    return torch.cat([whole[:, :-1], last[:, None]], dim=1)
