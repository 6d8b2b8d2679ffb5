"""Rounding: what weights are after a quantizer, kept as floats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from torch_simu.bitsandbytes.rounding import nf4_rounded

_GROUP = 64


def rounded_to_8_bits(weight: Tensor) -> Tensor:
    """Round each row to 255 levels between plus and minus its largest absolute value.

    Args:
        weight: Shape: `(..., row)`.

    Returns:
        The rounded values. Shape and dtype: as `weight`.

    Examples:
        >>> rounded_to_8_bits(torch.tensor([[1.27, 0.004, -0.006]]))
        tensor([[ 1.2700,  0.0000, -0.0100]])
    """
    return _rounded(weight.float(), 127).to(weight.dtype)


def rounded_to_4_bits(weight: Tensor) -> Tensor:
    """Round to NF4 where bitsandbytes is installed; else each 64 neighbors to 15 levels of their largest value.

    Args:
        weight: Any shape.

    Returns:
        The rounded values. Shape and dtype: as `weight`.
    """
    try:
        return nf4_rounded(weight)
    except ImportError:
        return rounded_in_groups(weight)


def rounded_in_groups(weight: Tensor) -> Tensor:
    """Round each 64 neighbors to 15 levels between plus and minus their largest absolute value.

    Args:
        weight: Any shape.

    Examples:
        >>> rounded_in_groups(torch.tensor([7.0, 0.6, -3.4]))
        tensor([ 7.,  1., -3.])
    """
    flat = weight.float().flatten()
    groups = functional.pad(flat, (0, -len(flat) % _GROUP)).unflatten(0, (-1, _GROUP))
    return _rounded(groups, 7).flatten()[: len(flat)].reshape(weight.shape).to(weight.dtype)


def _rounded(rows: Tensor, levels: int) -> Tensor:
    # A row of zeros has no scale, and stays.
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny) / levels
    return torch.round(rows / scale) * scale
