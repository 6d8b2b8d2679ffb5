"""Pack: sequences one behind the other, and the clean keys and values that every query of a sample sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from torch_simu.attribution.methods.cacheable import cached, windows_of
from torch_simu.attribution.methods.call import device_of, logits_at, text_config
from torch_simu.attribution.sequences import ScoredSequence

if TYPE_CHECKING:
    from transformers import DynamicCache


class _CacheLayer(Protocol):
    update: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Sequences one behind the other, and what the clean pass left."""

    model: nn.Module
    ids: Tensor
    sequence: Tensor
    position: Tensor
    queries: Tensor
    targets: Tensor
    cache: DynamicCache
    cache_bytes: int
    windows: dict[str, int]
    ranks: dict[str, int]
    clean: Tensor

    def mask(self, queries: Tensor, kind: str) -> Tensor:
        """Which of all clean keys, then of the queries themselves, each query sees in layers of a kind."""
        before = _seen(self.sequence, self.position, queries, kind, self.windows)
        before &= self.position < self.position[queries, None]
        own = torch.eye(queries.numel(), dtype=torch.bool, device=queries.device)
        return torch.cat([before, own], dim=1)

    def logits(self, queries: Tensor, streams: int) -> Tensor:
        """Return the model's logits at some queries. Shape: `(streams, num_queries, vocabulary)`."""
        output = self.model(
            input_ids=self.ids[queries].expand(streams, -1),
            position_ids=self.position[queries].expand(streams, -1),
            attention_mask=_masks(self.model, self.windows, partial(self.mask, queries)),
            past_key_values=self.cache,
            use_cache=True,
        )
        return cast("Tensor", output.logits)


def _seen(sequence: Tensor, position: Tensor, queries: Tensor, kind: str, windows: Mapping[str, int]) -> Tensor:
    same = sequence[queries, None] == sequence
    if kind == "sliding_attention":
        return same & (position[queries, None] - position < windows[kind])
    if kind == "chunked_attention":
        return same & (position[queries, None] // windows[kind] == position // windows[kind])
    return same


def pack_of(model: nn.Module, sequences: Sequence[ScoredSequence], layers: Mapping[str, nn.Module]) -> Pack:
    """Run the clean pass over some sequences; the layers' inputs are looked at."""
    # Imported here, because the package itself must not need transformers.
    from transformers import DynamicCache

    device = device_of(model)
    lengths = torch.tensor([len(each) for each in sequences])
    starts = lengths.cumsum(0) - lengths
    ids = torch.cat([sequence.ids for sequence in sequences]).to(device)
    index = torch.arange(len(sequences)).repeat_interleave(lengths).to(device)
    position = torch.cat([torch.arange(len(sequence)) for sequence in sequences]).to(device)
    shifted = [each.queries + start for each, start in zip(sequences, starts.tolist(), strict=True)]
    queries = torch.cat(shifted).to(device)
    targets = torch.cat([each.targets for each in sequences]).to(device)
    cache = DynamicCache()
    windows, everything = windows_of(model), torch.arange(len(ids), device=device)

    def causal(kind: str) -> Tensor:
        return _seen(index, position, everything, kind, windows) & (position <= position[:, None])

    with _recorded_ranks(layers) as ranks, torch.no_grad():
        clean = logits_at(
            model,
            queries,
            input_ids=ids[None],
            position_ids=position[None],
            attention_mask=_masks(model, windows, causal),
            past_key_values=cache,
            use_cache=True,
        )
    cache_bytes = 0
    for layer in cast("list[_CacheLayer]", cache.layers):
        keys, values = (cached(layer, name, ids.numel()) for name in ("keys", "values"))
        # The cache is only read from now on: every pass sees the clean keys and values, then its own.
        layer.update = partial(_joined, keys, values)
        cache_bytes += keys.nbytes + values.nbytes
    return Pack(model, ids, index, position, queries, targets, cache, cache_bytes, windows, ranks, clean)


def _joined(
    clean_keys: Tensor, clean_values: Tensor, keys: Tensor, values: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    streams = keys.shape[0]
    return (
        torch.cat([clean_keys.expand(streams, -1, -1, -1), keys], dim=2),
        torch.cat([clean_values.expand(streams, -1, -1, -1), values], dim=2),
    )


def _masks(model: nn.Module, windows: Mapping[str, int], visible: Callable[[str], Tensor]) -> object:
    """Return the mask as the model's attention takes it, or one for each kind of layer where there are several."""
    masks = {kind: _mask_of(model, visible(kind)) for kind in windows}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _mask_of(model: nn.Module, visible: Tensor) -> Tensor:
    """Return the mask as the model's attention takes it. Shape: `(1, 1, num_queries, num_keys)`."""
    if getattr(text_config(model), "_attn_implementation", None) == "sdpa":
        return visible[None, None]
    dtype = next((param.dtype for param in model.parameters() if param.is_floating_point()), torch.float32)
    hidden = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, hidden)[None, None]


@contextmanager
def _recorded_ranks(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Yield a mapping that the next forward pass fills with the number of dimensions of each layer's input."""
    ranks: dict[str, int] = {}
    with ExitStack() as stack:
        for name, module in layers.items():

            def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                ranks[name] = args[0].dim()

            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield ranks
