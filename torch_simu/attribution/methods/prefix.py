"""Exact attribution by definition: one forward and backward pass per prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from torch_simu.attribution.methods.budget import Chunks, byte_budget, bytes_per_token
from torch_simu.attribution.methods.call import device_of, logits_at
from torch_simu.attribution.methods.rows import Rows
from torch_simu.attribution.methods.sums import LayerSum, path_sums
from torch_simu.attribution.path import Path
from torch_simu.attribution.sequences import ScoredSequence
from torch_simu.attribution.site import Site


def prefix_sums(
    model: nn.Module, sequences: Sequence[ScoredSequence], layers: Mapping[str, nn.Module], path: Path
) -> Iterator[tuple[str, LayerSum]]:
    """Yield the exact sum of each layer over all samples of the sequences, for any causal model.

    Args:
        model: A causal language model, frozen; only `input_ids` is passed to it.
        sequences: Sequences with samples. Prefixes of equal length share a pass.
        layers: Name -> module.
        path: Objective and path points.
    """
    tokens = max(1, byte_budget(model) // bytes_per_token(model))
    for name, module in layers.items():
        sums = []
        for ids, targets in prefixes(sequences, device_of(model)):
            count, length = ids.shape
            values = partial(_prefix_values, model, name, module, ids, targets, path)
            points = max(1, min(path.steps + 2, tokens // (count * length)))
            chunks = Chunks(points, max(1, min(count, tokens // (points * length))))
            sums.append(path_sums(model, values, path, chunks, count)[name])
        yield name, sum(sums[1:], start=sums[0])


def prefix_rows(
    model: nn.Module, sequences: Sequence[ScoredSequence], _: Mapping[str, nn.Module], path: Path
) -> Iterator[Rows]:
    """Yield the samples of the sequences for passes in which each is changed elsewhere; arguments of `prefix_sums`."""
    tokens = max(1, byte_budget(model) // bytes_per_token(model))
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
    name: str,
    module: nn.Module,
    ids: Tensor,
    targets: Tensor,
    path: Path,
    alphas: list[float],
    part: slice,
) -> tuple[Tensor, dict[str, Site]]:
    """Return F of each path point and prefix, and the scaled layer."""
    ids, targets = ids[part], targets[part]
    count, length = ids.shape

    def place(leaf: Tensor, whole: Tensor) -> Tensor:
        return torch.cat([whole[:, :-1], leaf.flatten(0, 1)[:, None]], dim=1)

    site = Site(name, module, len(alphas) * count, length, alphas, lambda whole: whole[:count, -1], place)
    with site.scaled():
        last = torch.tensor([length - 1], device=ids.device)
        logits = logits_at(model, last, input_ids=ids.repeat(len(alphas), 1), use_cache=False)
    return path.values(logits[:, 0].reshape(len(alphas), count, -1), targets), {name: site}
