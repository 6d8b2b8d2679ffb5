"""Rounding: float weights as they are after NF4."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from torch_simu.bitsandbytes.installed import require_bitsandbytes


def nf4_rounded(weight: Tensor) -> Tensor:
    """Return the values of the NF4 codes of a weight, in blocks of 64. Shape and dtype: as `weight`.

    Raises:
        ImportError: If bitsandbytes is not installed.
    """
    functional = require_bitsandbytes("NF4")
    codes, state = functional.quantize_4bit(weight.float().contiguous(), blocksize=64, quant_type="nf4")
    return cast("Tensor", functional.dequantize_4bit(codes, state)).to(weight.dtype)
