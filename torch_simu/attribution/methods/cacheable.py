"""What a model's attention reads, and where that is more, or less, than cached keys and values of a prefix."""

from __future__ import annotations

from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.attribution.methods.call import accepts
from torch_simu.attribution.methods.sums import NotApplicableError

ADVICE = "Use method='prefix', which is exact and slower."

_WINDOWS = (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size"))


def windows_of(model: nn.Module) -> dict[str, int]:
    """Return the kinds of attention layers, each with the size of its window or chunk; 0: none.

    Raises:
        NotApplicableError: If a layer is of another kind.
    """
    config = getattr(model, "config", None)
    sizes = {kind: getattr(config, name, None) for kind, name in _WINDOWS}
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        # Models without a list of kinds have one for all layers.
        windowed = getattr(config, "use_sliding_window", True) and sizes["sliding_attention"]
        kinds = {"sliding_attention" if windowed else "full_attention"}
    if other := kinds - {"full_attention", *sizes}:
        wrong = f"The model mixes positions by {', '.join(sorted(other))}"
        raise NotApplicableError(problem(wrong, "attention only", ADVICE))
    # Where no window is set, a layer of that kind sees everything.
    return {kind: sizes.get(kind) or 2**62 for kind in sorted(kinds)}


def check_cacheable(model: nn.Module) -> None:
    """Raise `NotApplicableError` where a position reads more, or less, than cached keys and values of its prefix."""
    config = getattr(model, "config", None)
    if not accepts(model, "past_key_values") or getattr(config, "is_encoder_decoder", False):
        raise NotApplicableError(problem("The model has no key-value cache", "a causal transformer", ADVICE))
    if getattr(model, "_is_stateful", False):
        raise NotApplicableError(problem("The model mixes positions by a recurrent state", "attention only", ADVICE))
    windows_of(model)


def check_masks(model: nn.Module) -> None:
    """Raise `NotApplicableError` where the model takes no mask and no position for each query."""
    config = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("sdpa", "eager"):
        wrong = f"The attention implementation is {implementation!r}"
        raise NotApplicableError(problem(wrong, "'sdpa' or 'eager', which take a mask per query", _DECODE))
    if not accepts(model, "position_ids") or getattr(config, "alibi", False):
        raise NotApplicableError(problem("The model takes no position_ids", "positions given per query", _DECODE))
    if "local" in (getattr(config, "attention_layers", None) or ()):
        raise NotApplicableError(problem("The model builds its own local mask", "one that can be given", _DECODE))


def cached(layer: object, name: str, length: int) -> Tensor:
    """Return the keys or values of a layer of a cache.

    Raises:
        NotApplicableError: If it does not hold those of every position.
    """
    found = getattr(layer, name, None)
    if not isinstance(found, Tensor) or found.dim() != 4 or found.shape[2] != length:
        wrong = f"A layer caches {type(layer).__name__}"
        raise NotApplicableError(problem(wrong, "keys and values of every position", ADVICE))
    return found


_DECODE = "Use method='decode', which is exact and slower."
