r"""Exact attribution of many samples per pass: clean keys and values are cached, every sample is one query.

A sample changes one layer at the last position of its prefix, so all later layers read clean keys and values before it.
One clean pass caches them; then the query of a sample sees the clean keys of its own sequence before it, and itself:

$$\text{visible}(q, k) = [\text{sequence}_k = \text{sequence}_q] \; [\text{position}_k < \text{position}_q], \qquad
\text{visible}(q, q) = 1,$$

and in layers with a sliding window or with chunks only what those leave of it.

Sequences are packed one behind the other, so nothing is padded. Below a changed layer all path points are equal, so its
streams, one per path point, begin at its block: many layers share a pass, and none pays for what is below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.attribution.methods.budget import Chunks, chunk_sizes
from torch_simu.attribution.methods.cacheable import ADVICE, check_cacheable, check_masks
from torch_simu.attribution.methods.memory import Memory
from torch_simu.attribution.methods.packed.growing import blocks_of, growing
from torch_simu.attribution.methods.packed.pack import Pack, pack_of
from torch_simu.attribution.methods.rows import Rows
from torch_simu.attribution.methods.sums import LayerSum, NotApplicableError, path_sums
from torch_simu.attribution.path import Path
from torch_simu.attribution.sequences import ScoredSequence
from torch_simu.attribution.site import Site


def packed_sums(
    model: nn.Module, sequences: Sequence[ScoredSequence], layers: Mapping[str, nn.Module], path: Path, memory: Memory
) -> Iterator[tuple[str, LayerSum]]:
    """Yield the exact sum of each layer over all samples of the sequences.

    Args:
        model: A causal language model of transformers, frozen.
        sequences: Sequences with samples.
        layers: Name -> module.
        path: Objective and path points.
        memory: What one pass may take.

    Raises:
        NotApplicableError: If the model's layers do more than full attention over these sequences.
    """
    check_cacheable(model, sequences)
    check_masks(model)
    pack = pack_of(model, sequences, layers)
    clean = path.values(pack.clean[0], pack.targets)
    count = pack.queries.numel()
    blocks = blocks_of(model, layers)
    points, queries = chunk_sizes(memory.limit, path.steps, count, pack.cache_bytes, memory.per_token)
    per_layer = points * (pack.cache_bytes + queries * memory.per_token)
    size = max(1, memory.limit // per_layer) if blocks else 1
    names = list(layers)
    bands = [names[start : start + size] for start in range(0, len(names), size)]
    while bands:
        band = bands.pop(0)
        values = partial(
            _values, pack, {name: layers[name] for name in band}, {name: blocks[name] for name in band if blocks}, path
        )
        try:
            yield from path_sums(model, values, path, Chunks(points, queries), count, clean, apart=True).items()
        except torch.OutOfMemoryError:
            if len(band) == 1:
                raise
            half = len(band) // 2
            bands = [band[:half], band[half:], *bands]


def packed_rows(
    model: nn.Module, sequences: Sequence[ScoredSequence], layers: Mapping[str, nn.Module], path: Path, memory: Memory
) -> Iterator[Rows]:
    """Yield the samples of the sequences for passes in which each is changed elsewhere; arguments of `packed_sums`."""
    pack = pack_of(model, sequences, layers)
    _, most = chunk_sizes(memory.limit, 1, pack.queries.numel(), pack.cache_bytes, memory.per_token)

    def values(part: slice) -> Tensor:
        return path.values(pack.logits(pack.queries[part], 1)[0], pack.targets[part])

    yield Rows(
        pack.queries.numel(), most, lambda count: (1, count), lambda rows: (torch.zeros_like(rows), rows), values
    )


def _values(
    pack: Pack,
    layers: Mapping[str, nn.Module],
    blocks: Mapping[str, nn.Module],
    path: Path,
    alphas: list[float],
    part: slice,
) -> tuple[Tensor, dict[str, Site]]:
    """Return F of each path point, layer and query, and the scaled layers."""
    queries, targets = pack.queries[part], pack.targets[part]
    if not blocks:
        return _values_of_one(pack, layers, path, alphas, queries, targets)
    with growing(blocks, layers, queries.numel(), alphas) as sites:
        logits = pack.logits(queries, 1)
    _check_shape(logits, 1 + len(layers) * len(alphas), queries.numel())
    found = path.values(logits[1:], targets)
    return found.unflatten(0, (len(layers), len(alphas))).transpose(0, 1), sites


def _values_of_one(
    pack: Pack, layers: Mapping[str, nn.Module], path: Path, alphas: list[float], queries: Tensor, targets: Tensor
) -> tuple[Tensor, dict[str, Site]]:
    ((name, module),) = layers.items()
    # A layer that sees streams and tokens as one dimension cannot turn one stream into several.
    streams = len(alphas) if pack.ranks.get(name) == 2 else 1
    site = Site(name, module, streams, queries.numel(), alphas, lambda whole: whole[0], lambda leaf, _: leaf)
    with site.scaled():
        logits = pack.logits(queries, streams)
    _check_shape(logits, len(alphas), queries.numel())
    return path.values(logits, targets)[:, None], {name: site}


def _check_shape(logits: Tensor, streams: int, queries: int) -> None:
    if logits.shape[:2] != (streams, queries):
        wrong = f"A pass over {streams} streams gives logits of shape {tuple(logits.shape)}"
        raise NotApplicableError(problem(wrong, f"({streams}, {queries}, vocabulary)", ADVICE))
