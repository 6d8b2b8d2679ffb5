"""Everything that touches bitsandbytes: 8-bit codes of values, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_simu._checks import problem

BLOCK = 256
"""Values that share a scale."""


def require_bitsandbytes(what: str) -> Any:
    """Return bitsandbytes' functional module.

    Args:
        what: What needs it, for the message.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        from bitsandbytes import functional
    except ImportError as error:
        advice = 'Install it: pip install "torch-simu[int8]".'
        raise ImportError(problem(f"{what} needs bitsandbytes", "it installed", advice)) from error
    return functional


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
    code = functional.create_dynamic_map(signed=signed).to(values.device)
    functional.quantize_blockwise(values.float().contiguous(), code=code, absmax=scales, out=codes, blocksize=BLOCK)


def read_blocks(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return the float32 values that `write_blocks` wrote.

    Args:
        codes: The codes.
        scales: The scales.
        signed: As they were written.

    Raises:
        ImportError: If bitsandbytes is not installed.
    """
    functional = require_bitsandbytes("8-bit state")
    code = functional.create_dynamic_map(signed=signed).to(codes.device)
    values: Tensor = functional.dequantize_blockwise(codes, absmax=scales, code=code, blocksize=BLOCK)
    return values.to(torch.float32)
