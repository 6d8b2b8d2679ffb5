"""Rotary positions that depend on the length of the pass: dynamic NTK, and longrope beyond the trained length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_simu.attribution.sequences import ScoredSequence

_ORIGINAL = "original_inv_freq"


def rotation_changes(module: Any) -> Iterator[tuple[int, bool]]:
    """Yield where a rotary embedding of transformers turns the same positions otherwise.

    Yields:
        The longest pass with the trained rotations, and whether longer passes differ from each other, too.
    """
    found = getattr(module, "rope_type", None)
    for layer_type, kind in found.items() if isinstance(found, dict) else [(None, found)]:
        if "dynamic" in str(kind):
            yield module.original_max_seq_len, True
        elif kind == "longrope":
            parameters = module.config.rope_parameters
            parameters = parameters if layer_type is None else parameters[layer_type]
            yield parameters["original_max_position_embeddings"], False


def mixed_lengths(model: nn.Module, sequences: Sequence[ScoredSequence]) -> tuple[int, int] | None:
    """Return the lengths of two prefixes whose common positions the model turns differently; None: there are none."""
    # In a prefix of one token nothing is turned against anything.
    lengths = torch.cat([each.queries for each in sequences]).clamp(min=1) + 1
    shortest, longest = int(lengths.min()), int(lengths.max())
    for module in model.modules():
        for trained, varies in rotation_changes(module):
            if longest > trained and (shortest <= trained or (varies and shortest < longest)):
                return shortest, longest
    return None


@contextmanager
def fresh_positions(model: nn.Module) -> Iterator[None]:
    """Turn positions in each pass as a fresh model does, whatever passes came before; restore what they leave."""
    with ExitStack() as stack:
        for module in model.modules():
            if next(rotation_changes(module), None) is not None:
                buffers = {name: (each, each.clone()) for name, each in module.named_buffers(recurse=False)}
                stack.callback(_restore, module, dict(vars(module)), buffers)
                stack.callback(module.register_forward_pre_hook(_refresh).remove)
        yield


def _refresh(module: Any, _: tuple[object, ...]) -> None:
    # Dynamic rotations keep those of the longest pass so far.
    for name in [name for name in (*vars(module), *module._buffers) if name.endswith(_ORIGINAL)]:
        prefix = name.removesuffix(_ORIGINAL)
        current = module._buffers[f"{prefix}inv_freq"]
        module._buffers[f"{prefix}inv_freq"] = getattr(module, name).to(current.device, copy=True)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _restore(module: nn.Module, attributes: dict[str, object], buffers: dict[str, tuple[Tensor, Tensor]]) -> None:
    vars(module).clear()
    vars(module).update(attributes)
    for name, (buffer, values) in buffers.items():
        buffer.copy_(values)
        module._buffers[name] = buffer
