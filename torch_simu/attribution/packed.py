r"""Exact attribution of many samples per pass: clean keys and values are cached, every sample is one query.

A sample changes one layer at the last position of its prefix, so all later layers read clean keys and values before it.
One clean pass caches them; then the query of a sample sees the clean keys of its own row before it, and itself:

$$\text{visible}(q, k) = [\text{row}_k = \text{row}_q] \; [\text{position}_k < \text{position}_q], \qquad
\text{visible}(q, q) = 1.$$

Rows are packed one behind the other, so nothing is padded. Below the changed layer all path points are equal: there one
stream runs, which that layer's input turns into one stream per path point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.attribution.budget import byte_budget, bytes_per_token, chunk_sizes
from torch_simu.attribution.intervention import accepts, device_of, logits_at, recorded_inputs, replaced_input
from torch_simu.attribution.path import Path
from torch_simu.attribution.rows import Row
from torch_simu.attribution.sums import LayerSum, NotApplicableError, attributed, scaled

if TYPE_CHECKING:
    from transformers import DynamicCache

_ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def packed_sums(
    model: nn.Module, rows: Sequence[Row], layers: Mapping[str, nn.Module], path: Path
) -> Iterator[tuple[str, LayerSum]]:
    """Yield the exact sum of each layer over all samples of the rows.

    Args:
        model: A causal language model of transformers, frozen.
        rows: Sequences with samples.
        layers: Name -> module.
        path: Objective and path points.

    Raises:
        NotApplicableError: If the model's layers do more than full attention over these rows.
    """
    check_packable(model, rows)
    pack = _pack(model, rows, dict(layers))
    for name, module in layers.items():
        yield name, _layer_sum(pack, name, module, path)


def check_packable(model: nn.Module, rows: Sequence[Row]) -> None:
    """Raise `NotApplicableError` where one pass over cached keys cannot equal one pass per prefix."""
    config = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    check_cacheable(model, rows)
    if implementation not in ("sdpa", "eager"):
        wrong = f"The attention implementation is {implementation!r}"
        raise NotApplicableError(problem(wrong, "'sdpa' or 'eager', which take a mask per query", _ADVICE))
    if not accepts(model, "position_ids") or getattr(config, "alibi", False):
        raise NotApplicableError(problem("The model takes no position_ids", "positions given per query", _ADVICE))
    if "local" in (getattr(config, "attention_layers", None) or ()):
        raise NotApplicableError(problem("The model builds its own local mask", "one that can be given", _ADVICE))


def check_cacheable(model: nn.Module, rows: Sequence[Row]) -> None:
    """Raise `NotApplicableError` where a position reads more, or less, than cached keys and values of its prefix."""
    config = getattr(model, "config", None)
    if not accepts(model, "past_key_values") or getattr(config, "is_encoder_decoder", False):
        raise NotApplicableError(problem("The model has no key-value cache", "a causal transformer", _ADVICE))
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_TYPES
    if kinds or getattr(model, "_is_stateful", False):
        wrong = f"The model mixes positions by {', '.join(sorted(kinds)) or 'a recurrent state'}"
        raise NotApplicableError(problem(wrong, "attention only", _ADVICE))
    longest = max(map(len, rows))
    for name in ("sliding_window", "attention_chunk_size", "window_size"):
        window = getattr(config, name, None)
        if getattr(config, "use_sliding_window", True) and isinstance(window, int) and window < longest:
            wrong = f"The model's {name} {window} is shorter than the longest prefix, {longest} tokens"
            raise NotApplicableError(problem(wrong, f"prefixes of at most {window} tokens", _ADVICE))


_ADVICE = "Use method='prefix', which is exact and slower."


class _CacheLayer(Protocol):
    update: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class _Pack:
    """Rows one behind the other, and what the clean pass left."""

    model: nn.Module
    ids: Tensor
    row: Tensor
    position: Tensor
    queries: Tensor
    targets: Tensor
    cache: DynamicCache
    cache_bytes: int
    is_flat: dict[str, bool]
    clean: Tensor

    def mask(self, queries: Tensor) -> Tensor:
        """Which of all clean keys, then of the queries themselves, each query sees."""
        before = (self.row[queries, None] == self.row) & (self.position < self.position[queries, None])
        own = torch.eye(queries.numel(), dtype=torch.bool, device=queries.device)
        return torch.cat([before, own], dim=1)


def _pack(model: nn.Module, rows: Sequence[Row], layers: dict[str, nn.Module]) -> _Pack:
    # Imported here, because the package itself must not need transformers.
    from transformers import DynamicCache

    device = device_of(model)
    lengths = torch.tensor([len(row) for row in rows])
    starts = lengths.cumsum(0) - lengths
    ids = torch.cat([row.ids for row in rows]).to(device)
    index = torch.arange(len(rows)).repeat_interleave(lengths).to(device)
    position = torch.cat([torch.arange(len(row)) for row in rows]).to(device)
    queries = torch.cat([row.queries + start for row, start in zip(rows, starts.tolist(), strict=True)]).to(device)
    targets = torch.cat([row.targets for row in rows]).to(device)
    cache = DynamicCache()
    visible = (index[:, None] == index) & (position <= position[:, None])
    with recorded_inputs(layers) as inputs, torch.no_grad():
        clean = logits_at(
            model,
            queries,
            input_ids=ids[None],
            position_ids=position[None],
            attention_mask=_mask_of(model, visible),
            past_key_values=cache,
            use_cache=True,
        )
    is_flat = {name: activation.dim() == 2 for name, activation in inputs.items()}
    cache_bytes = 0
    for layer in cast("list[_CacheLayer]", cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4 or keys.shape[2] != ids.numel():
            wrong = f"A layer caches {type(layer).__name__}"
            raise NotApplicableError(problem(wrong, "keys and values of every position", _ADVICE))
        # The cache is only read from now on: every pass sees the clean keys and values, then its own.
        layer.update = partial(_joined, keys, values)
        cache_bytes += keys.nbytes + values.nbytes
    return _Pack(model, ids, index, position, queries, targets, cache, cache_bytes, is_flat, clean)


def _joined(
    clean_keys: Tensor, clean_values: Tensor, keys: Tensor, values: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    streams = keys.shape[0]
    return (
        torch.cat([clean_keys.expand(streams, -1, -1, -1), keys], dim=2),
        torch.cat([clean_values.expand(streams, -1, -1, -1), values], dim=2),
    )


def _layer_sum(pack: _Pack, name: str, module: nn.Module, path: Path) -> LayerSum:
    num_queries = pack.queries.numel()
    streams, size = chunk_sizes(
        byte_budget(pack.model), path.steps, num_queries, pack.cache_bytes, bytes_per_token(pack.model)
    )
    total = torch.zeros((), dtype=torch.float64)
    change = 0.0
    for start in range(0, num_queries, size):
        part = slice(start, start + size)
        change += path.values(pack.clean[0, part], pack.targets[part]).double().sum().item()
        for first in range(0, path.steps, streams):
            alphas = path.alphas[first : first + streams]
            # The end of the path is measured on the way: one stream more costs less than a pass of its own.
            ends = [0.0] if first == 0 else []
            values, leaf, activation = _stream_values(pack, name, module, [*alphas, *ends], part, path)
            change -= values[len(alphas) :].detach().double().sum().item()
            (gradient,) = torch.autograd.grad(values[: len(alphas)].sum(), leaf)
            total = total + attributed(gradient[: len(alphas)], activation)
    scores = total / path.steps
    return LayerSum(scores, scores.sum().item() - change)


def _stream_values(
    pack: _Pack, name: str, module: nn.Module, alphas: list[float], part: slice, path: Path
) -> tuple[Tensor, Tensor, Tensor]:
    """Return F of each path point and query, the scaled activations, and the clean ones."""
    queries, targets = pack.queries[part], pack.targets[part]
    # A layer that sees rows and tokens as one dimension cannot turn one stream into several.
    streams = len(alphas) if pack.is_flat.get(name) else 1
    found: dict[str, Tensor] = {}

    def replace(activation: Tensor) -> Tensor:
        found["activation"] = activation[0].detach()
        found["leaf"] = scaled(activation[0], alphas)
        return found["leaf"]

    with replaced_input(name, module, streams, queries.numel(), replace):
        logits = pack.model(
            input_ids=pack.ids[queries].expand(streams, -1),
            position_ids=pack.position[queries].expand(streams, -1),
            attention_mask=_mask_of(pack.model, pack.mask(queries)),
            past_key_values=pack.cache,
            use_cache=True,
        ).logits
    if logits.shape[:2] != (len(alphas), queries.numel()):
        wrong = f"Layer {name!r} with {len(alphas)} path points gives logits of shape {tuple(logits.shape)}"
        raise NotApplicableError(problem(wrong, f"({len(alphas)}, {queries.numel()}, vocabulary)", _ADVICE))
    return path.values(logits, targets), found["leaf"], found["activation"]


def _mask_of(model: nn.Module, visible: Tensor) -> Tensor:
    """Return the mask as the model's attention takes it. Shape: `(1, 1, num_queries, num_keys)`."""
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa":
        return visible[None, None]
    dtype = next((param.dtype for param in model.parameters() if param.is_floating_point()), torch.float32)
    hidden = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, hidden)[None, None]
