"""Blocks: values as 8-bit codes with one scale for each block, as 8-bit optimizers keep their state."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from torch_simu.bitsandbytes.installed import require_bitsandbytes

BLOCK = 256
"""Values that share a scale."""


def write_blocks(values: Tensor, codes: Tensor, scales: Tensor, *, signed: bool) -> None:
    """Write values as 8-bit codes with one scale for each block, by the dynamic map of 8-bit optimizers.

    Args:
        values: Any float tensor; not below zero unless `signed`.
        codes: Where the codes go, uint8. Shape: as `values`.
        scales: Where the scales go, float32. Shape: `(ceil(values.numel() / BLOCK),)`.
        signed: Whether values may be negative.

    Raises:
        ImportError: If bitsandbytes is not installed.
    """
    functional = require_bitsandbytes("8-bit state")
    code = _code_map(signed, values.device)
    functional.quantize_blockwise(values.float().contiguous(), code=code, absmax=scales, out=codes, blocksize=BLOCK)


def read_blocks(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return the float32 values that `write_blocks` wrote.

    Args:
        codes: The codes. Shape: of the values.
        scales: The scale of each block.
        signed: As they were written.

    Raises:
        ImportError: If bitsandbytes is not installed.
    """
    functional = require_bitsandbytes("8-bit state")
    code = _code_map(signed, codes.device)
    values: Tensor = functional.dequantize_blockwise(codes, absmax=scales, code=code, blocksize=BLOCK)
    return values.to(torch.float32)


@cache
def _code_map(signed: bool, device: torch.device) -> Tensor:
    # Made once: it is never changed, and takes longer than the blocks of a small parameter.
    code: Tensor = require_bitsandbytes("8-bit state").create_dynamic_map(signed=signed).to(device)
    return code
