"""How many tokens one forward and backward pass may hold."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from torch_simu.attribution.intervention import device_of
from torch_simu.layers import is_neuron_layer

_HOST_BYTES = 2**30


def bytes_per_token(model: nn.Module) -> int:
    """Estimate what a token occupies between forward and backward pass: outputs of linear layers, logits in 32 bits."""
    floating = [param.element_size() for param in model.parameters() if param.is_floating_point()]
    widths = [
        cast("int", getattr(module, "out_features", None) or module.nf)
        for module in model.modules()
        if is_neuron_layer(module)
    ]
    return 2 * max(floating, default=4) * sum(widths) + 8 * max(widths, default=0)


def byte_budget(model: nn.Module) -> int:
    """Return the bytes that one pass may take: a quarter of an accelerator's free memory, 1 GiB elsewhere."""
    device = device_of(model)
    if device.type == "cuda":
        return max(_HOST_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    return _HOST_BYTES


def chunk_sizes(budget: int, steps: int, queries: int, per_stream: int, per_token: int) -> tuple[int, int]:
    """Return how many path points and queries go through one pass.

    Args:
        budget: Bytes for one pass.
        steps: Path points wanted.
        queries: Queries wanted.
        per_stream: Bytes per path point, whatever the number of queries.
        per_token: Bytes per path point and query.

    Examples:
        >>> chunk_sizes(1000, steps=10, queries=8, per_stream=100, per_token=10)
        (5, 8)
        >>> chunk_sizes(1000, steps=10, queries=80, per_stream=0, per_token=10)
        (10, 10)
        >>> chunk_sizes(1, steps=10, queries=8, per_stream=100, per_token=10)
        (1, 1)
    """
    streams = max(1, min(steps, budget // 2 // max(1, per_stream)))
    streams = max(1, min(streams, budget // max(1, per_token)))
    left = max(budget // 2, budget - streams * per_stream)
    return streams, max(1, min(queries, left // max(1, streams * per_token)))
