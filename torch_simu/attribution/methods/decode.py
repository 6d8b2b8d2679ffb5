"""Exact attribution by decoding: every sample is a row of one token behind its own cached prefix, as in generation.

Each sample's clean keys and values stand right before its token, with padding on the left. So whatever a model does in
generation is done here, too: distances are those of the prefix (ALiBi, local attention), and the mask has one dimension
for keys (flash attention).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from torch_simu.attribution.methods.budget import Chunks, chunk_sizes
from torch_simu.attribution.methods.cacheable import cached, check_cacheable
from torch_simu.attribution.methods.call import accepts, device_of
from torch_simu.attribution.methods.memory import Memory
from torch_simu.attribution.methods.rows import Rows
from torch_simu.attribution.methods.sums import LayerSum, path_sums
from torch_simu.attribution.path import Path
from torch_simu.attribution.sequences import ScoredSequence
from torch_simu.attribution.site import Site


def decode_sums(
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
        NotApplicableError: If the model's layers do more than attention over these sequences.
    """
    check_cacheable(model, sequences)
    prefixes = _prefixes(model, sequences)
    clean = path.values(prefixes.clean, prefixes.targets)
    count = prefixes.ids.numel()
    sizes = chunk_sizes(memory.limit, path.steps + 1, count, 0, prefixes.prefix_bytes + memory.per_token)
    for name, module in layers.items():
        values = partial(_token_values, prefixes, name, module, path)
        yield name, path_sums(model, values, path, Chunks(*sizes), count, clean)[name]


def decode_rows(
    model: nn.Module, sequences: Sequence[ScoredSequence], _: Mapping[str, nn.Module], path: Path, memory: Memory
) -> Iterator[Rows]:
    """Yield the samples of the sequences for passes in which each is changed elsewhere; arguments of `decode_sums`."""
    prefixes = _prefixes(model, sequences)
    count = prefixes.ids.numel()
    most = chunk_sizes(memory.limit, 1, count, 0, prefixes.prefix_bytes + memory.per_token)[1]

    def values(part: slice) -> Tensor:
        return path.values(prefixes.logits(part, 1)[0], prefixes.targets[part])

    yield Rows(count, most, lambda count: (count, 1), lambda rows: (rows, torch.zeros_like(rows)), values)


@dataclass(frozen=True, slots=True, eq=False)
class _Prefixes:
    """What the clean pass left: the samples, and for each layer the keys and values of the sequences."""

    model: nn.Module
    ids: Tensor
    row: Tensor
    position: Tensor
    targets: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    clean: Tensor

    def before(self, part: slice) -> tuple[Tensor, Tensor]:
        """Indices of the positions before each sample, the last one right, and which of them there are."""
        position = self.position[part, None]
        # One at least, hidden, for samples of one token.
        length = max(1, int(position.max()))
        index = position - length + torch.arange(length, device=position.device)
        return index.clamp(min=0), index >= 0

    @property
    def prefix_bytes(self) -> int:
        """What the prefix of one sample and path point occupies in a pass."""
        prefix = sum(each[0].nbytes for each in (*self.keys, *self.values))
        # Joining a token to its prefix copies the prefix.
        return 2 * prefix

    def logits(self, part: slice, streams: int) -> Tensor:
        """Return the model's logits at some samples. Shape: `(streams, num_samples, vocabulary)`."""
        from transformers import DynamicCache

        row = self.row[part, None]
        index, visible = self.before(part)
        count = len(index)
        cache = DynamicCache()
        for number, pair in enumerate(zip(self.keys, self.values, strict=True)):
            # Indexed on both sides of the heads, the heads come last but one.
            keys, values = (each[row, :, index].transpose(1, 2).repeat(streams, 1, 1, 1) for each in pair)
            cache.update(keys, values, number)
        inputs: dict[str, Tensor] = {}
        if accepts(self.model, "position_ids"):
            inputs["position_ids"] = self.position[part, None].repeat(streams, 1)
        logits = self.model(
            input_ids=self.ids[part, None].repeat(streams, 1),
            attention_mask=torch.cat([visible, visible.new_ones(count, 1)], dim=1).long().repeat(streams, 1),
            past_key_values=cache,
            use_cache=True,
            **inputs,
        ).logits
        return cast("Tensor", logits[:, 0].reshape(streams, count, -1))


def _prefixes(model: nn.Module, sequences: Sequence[ScoredSequence]) -> _Prefixes:
    # Imported here, because the package itself must not need transformers.
    from transformers import DynamicCache

    device = device_of(model)
    ids = pad_sequence([each.ids for each in sequences], batch_first=True).to(device)
    # Padding on the right is seen by no position before it; the mask keeps models from warning of it.
    mask = pad_sequence([torch.ones_like(each.ids) for each in sequences], batch_first=True).to(device)
    counts = torch.tensor([each.num_samples for each in sequences])
    row = torch.arange(len(sequences)).repeat_interleave(counts).to(device)
    position = torch.cat([each.queries for each in sequences]).to(device)
    cache = DynamicCache()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    keys, values = ([cached(layer, name, ids.shape[1]) for layer in cache.layers] for name in ("keys", "values"))
    targets = torch.cat([each.targets for each in sequences]).to(device)
    return _Prefixes(model, ids[row, position], row, position, targets, keys, values, logits[row, position])


def _token_values(
    prefixes: _Prefixes, name: str, module: nn.Module, path: Path, alphas: list[float], part: slice
) -> tuple[Tensor, dict[str, Site]]:
    """Return F of each path point and sample, and the scaled layer."""
    targets, streams = prefixes.targets[part], len(alphas)
    count = targets.numel()
    site = Site(
        name, module, streams * count, 1, alphas, lambda whole: whole[:count], lambda leaf, _: leaf.flatten(0, 1)
    )
    with site.scaled():
        logits = prefixes.logits(part, streams)
    return path.values(logits, targets)[:, None], {name: site}
