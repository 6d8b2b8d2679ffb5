"""Packing: what bitsandbytes does to 4-bit codes on some processors, and how to keep it from doing so.

There the first pass without gradients packs the codes of a layer anew, for inference. A packed layer passes no gradient
on, without an error, and its scales are rounded for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from torch_simu._checks import problem
from torch_simu.bitsandbytes.layers import check_unpacked, is_4bit

_SWITCH, _HELD = "support_avx512bf16_for_cpu", "_codes_held"


def check_codes(model: nn.Module) -> None:
    """Raise where a 4-bit layer of the model passes no gradient on, or a wrong one.

    Raises:
        ValueError: If a layer is not quantized yet, or its codes were packed for inference.
    """
    for name, layer in model.named_modules():
        if not is_4bit(layer):
            continue
        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            raise ValueError(problem(f"The 4-bit layer {name!r} has no codes", "codes", "Move it to its device first."))
        check_unpacked(f"The codes of the 4-bit layer {name!r}", layer)


def keep_codes_as_loaded(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit codes of a model for inference, until `let_codes_go` was called as often.

    Raises:
        ValueError: As `check_codes`; nothing is kept then.
    """
    check_codes(model)
    for layer in filter(is_4bit, model.modules()):
        count, before = layer.__dict__.get(_HELD, (0, layer.__dict__.get(_SWITCH, False)))
        layer.__dict__[_HELD] = count + 1, before
        layer.__dict__[_SWITCH] = False


def let_codes_go(model: nn.Module) -> None:
    """Undo one call of `keep_codes_as_loaded` on a model."""
    for layer in filter(is_4bit, model.modules()):
        if _HELD not in layer.__dict__:
            continue
        count, before = layer.__dict__.pop(_HELD)
        if count > 1:
            layer.__dict__[_HELD] = count - 1, before
        else:
            layer.__dict__[_SWITCH] = before


@contextmanager
def codes_as_loaded(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit codes of a model from being packed inside the block.

    Raises:
        ValueError: As `check_codes`.
    """
    keep_codes_as_loaded(model)
    try:
        yield
    finally:
        let_codes_go(model)
