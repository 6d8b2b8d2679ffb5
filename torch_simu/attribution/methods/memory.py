"""Memory: what one forward and backward pass may take, and what a token of it takes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from torch_simu._checks import check_number, problem
from torch_simu.attribution.methods.call import device_of

_HOST_BYTES = 2**30
_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Memory:
    """What one pass may take.

    Args:
        limit: Bytes.
        per_token: Bytes that a token takes between forward and backward pass; hardly any, where few tokens are run.

    Examples:
        >>> Memory(limit=1000, per_token=30).tokens
        33
    """

    limit: int
    per_token: int = 1

    @property
    def tokens(self) -> int:
        """How many tokens a pass may hold, one at least."""
        return max(1, self.limit // self.per_token)

    @classmethod
    def of(cls, model: nn.Module, ids: Tensor, limit: int | float | None = None) -> Memory:
        """Measure what a token takes, in a forward pass of one sequence.

        Args:
            model: A causal language model, frozen.
            ids: Token ids. Shape: `(length,)`.
            limit: Bytes, or below 1 a share of an accelerator's free memory, or of 4 GiB elsewhere. None: a quarter.
        """
        return cls(limit_of(model, limit), bytes_per_token(model, ids))


def check_memory(limit: int | float | None) -> None:
    """Raise where a limit is neither bytes nor a share.

    Raises:
        ValueError: If it is not above 0, or is no whole number above 1.
        TypeError: If it is no number.
    """
    if limit is None:
        return
    check_number("memory", limit, low_open=True)
    if limit >= 1 and limit != int(limit):
        raise ValueError(problem(f"memory is {limit}", "whole bytes, or a share of the free memory below 1"))


def limit_of(model: nn.Module, limit: int | float | None) -> int:
    """Return the bytes that one pass may take."""
    if limit is not None and limit >= 1:
        return int(limit)
    device, share = device_of(model), _SHARE if limit is None else limit
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 * _HOST_BYTES
    return max(1 if limit is not None else _HOST_BYTES, int(free * share))


def bytes_per_token(model: nn.Module, ids: Tensor) -> int:
    """Return what a token takes between forward and backward pass: what is kept for a gradient by the embeddings.

    Args:
        model: A causal language model, frozen.
        ids: Token ids. Shape: `(length,)`.
    """
    # By the storage and not by its address, which tensors that wrap others do not have.
    known = {param.untyped_storage()._cdata for param in model.parameters() if not param.is_meta}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in known:
            # Held to the end, lest another tensor takes its place.
            kept[storage] = tensor
        return tensor

    def traced(_: nn.Module, __: object, output: object) -> object:
        # Embeddings of positions may return those, too (ProphetNet).
        if isinstance(output, tuple):
            return tuple(traced(_, __, each) for each in output)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        # No leaf, which models may not scale in place.
        return output.detach().requires_grad_().clone()

    with ExitStack() as stack:
        for embedding in (module for module in model.modules() if isinstance(module, nn.Embedding)):
            stack.callback(embedding.register_forward_hook(traced).remove)
        stack.enter_context(saved_tensors_hooks(keep, lambda tensor: tensor))
        logits = cast("Tensor", model(input_ids=ids[None].to(device_of(model)), use_cache=False).logits)
        logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).sum()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # What an operation makes is there before what it is made of can go: the logits, and the gradients of both.
    return max(1, (total + 2 * logits.nbytes) // ids.numel())
