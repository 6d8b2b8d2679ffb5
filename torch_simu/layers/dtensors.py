"""Distributed tensors: what is one, and how it is spread, without loading them for those who have none."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Say whether a value is a distributed tensor.

    Examples:
        >>> import torch
        >>> is_dtensor(torch.zeros(2))
        False
    """
    # None exists before their module is loaded, which takes longer than the whole package.
    loaded = sys.modules.get("torch.distributed.tensor")
    return isinstance(value, getattr(loaded, "DTensor", ()))


def shard_dims(tensor: DTensor) -> list[int | None]:
    """Return along which of its dimensions a tensor is sharded, for each dimension of its mesh; None: along none."""
    from torch.distributed.tensor import Shard

    return [each.dim if isinstance(each, Shard) else None for each in tensor.placements]


def shard_again(model: nn.Module) -> None:
    """Give a model of FSDP2 the shards back that a pass without a backward leaves together, as it does at the root."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if isinstance(module, getattr(loaded, "FSDPModule", ())):
            cast("Any", module).reshard()
