"""How momentum and curvature are kept: as floats of any width, or as 8-bit blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_simu._checks import problem
from torch_simu.bitsandbytes.blocks import BLOCK, read_blocks, write_blocks
from torch_simu.bitsandbytes.installed import require_bitsandbytes
from torch_simu.layers.dtensors import is_dtensor
from torch_simu.optimizer.entries import Entry, local, stored

SHAPED = ("exp_avg", "hessian", "master")
"""Keys of the state whose values have the compact shape."""

FACTORS = ("neuron_factor", "output_factor", "input_factor")
"""Keys of the Cholesky factors of covariances, the same in every process.

The first is of what is selected, neurons or the gradients of outputs; the others are of the other side of the weight,
outputs where columns are selected and inputs where rows are.
"""

WHOLE = (*FACTORS, "weight_norm")
"""Keys of the state that are never spread over processes."""

_SCALES = "_absmax"


def allocate(state: dict[str, Any], key: str, entry: Entry, dtype: torch.dtype) -> None:
    """Put zeros of the compact shape into the state."""
    zeros = torch.zeros_like(entry.grad, dtype=dtype, memory_format=torch.contiguous_format)
    state[key] = stored(zeros, entry.param, entry.columns)
    if dtype == torch.uint8:
        state[key + _SCALES] = zeros.new_zeros(-(-zeros.numel() // BLOCK), dtype=torch.float32)
        write(state, key, torch.zeros_like(entry.grad))


def read(state: Mapping[str, Any], key: str, dtype: torch.dtype) -> Tensor:
    """Return the values of this process in the dtype of the computation; the stored tensor itself where it has it."""
    value = local(state[key])
    if value.dtype == torch.uint8 and value.numel():
        value = read_blocks(value, state[key + _SCALES], signed=key == "exp_avg")
    return value.to(dtype)


def write(state: Mapping[str, Any], key: str, value: Tensor) -> None:
    """Store the values of this process."""
    kept = local(state[key])
    if kept.dtype == torch.uint8 and kept.numel():
        write_blocks(value, kept, state[key + _SCALES], signed=key == "exp_avg")
    else:
        # Onto itself this does nothing.
        kept.copy_(value)


def check_blockwise(group: Mapping[str, Any]) -> None:
    """Raise unless every parameter of a group can have 8-bit state.

    Raises:
        ValueError: If neurons are selected, or a parameter is distributed.
        ImportError: If bitsandbytes is not installed.
    """
    advice = "Use torch.float32 or torch.bfloat16 for this group."
    if any(neurons is not None for neurons in group["neurons"]):
        raise ValueError(problem("state_dtype is torch.uint8 for selected neurons", "whole parameters", advice))
    if any(is_dtensor(param) for param in group["params"]):
        raise ValueError(problem("state_dtype is torch.uint8 for a distributed parameter", "local ones", advice))
    require_bitsandbytes("state_dtype=torch.uint8")
