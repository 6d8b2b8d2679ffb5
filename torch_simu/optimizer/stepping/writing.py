"""Writing: the selected weights as a step computes with them, and back into the parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_simu.optimizer.entries import Entry, local
from torch_simu.optimizer.stepping.state import HALF
from torch_simu.update import counted_uniform, round_by, round_stochastically


def step_size(lr: float | Tensor, finite: Tensor | bool) -> float | Tensor:
    """Return the step size as a number or a scalar: zero where nothing may change."""
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    if not isinstance(finite, Tensor):
        return lr
    # A number is a float64 on the host as well.
    return finite * lr if isinstance(lr, Tensor) else finite.double() * lr


def adds(group: Mapping[str, Any], entry: Entry, state: Mapping[str, Any], finite: Tensor | bool) -> bool:
    """Say whether a step is added to the weights instead of written: it spares reading the scattered columns once."""
    plain = "master" not in state and entry.param.dtype == entry.grad.dtype and not entry.grad.is_cuda
    return plain and finite is True and group["weight_decay"] == 0 and entry.columns.indices is not None


def selected_weight(entry: Entry, state: Mapping[str, Any]) -> Tensor:
    """Return the selected weights in the dtype of the computation: the master copy where there is one."""
    weight = local(state["master"]) if "master" in state else entry.gather()
    return weight.to(entry.grad.dtype)


def write_weight(group: Mapping[str, Any], entry: Entry, weight: Tensor, finite: Tensor | bool) -> None:
    """Write new weights, where `finite` is true; a tensor that is the parameter's own is there already."""
    if weight is local(entry.param):
        return
    value = rounded_to(group, entry, weight)
    if isinstance(finite, Tensor):
        # Another draw would move a weight that the step must leave alone.
        value = torch.where(finite, value, entry.gather())
    entry.write(value)


def rounded_to(group: Mapping[str, Any], entry: Entry, weight: Tensor) -> Tensor:
    """Return new weights in the parameter's dtype, rounded as the group says."""
    dtype = entry.param.dtype
    if not group["stochastic_rounding"] or dtype not in HALF:
        return weight.to(dtype)
    # Seeded by what the checkpoint carries, so that a resumed run draws what the unbroken one would have drawn.
    seed = group["num_steps"] * 1_000_003 + entry.salt
    if isinstance(seed, Tensor):
        # A generator's seed is a number of the host, which a replayed CUDA graph would use again and again.
        return round_by(weight, dtype, counted_uniform(weight.shape, seed.to(weight.device)))
    return round_stochastically(weight, dtype, torch.Generator(weight.device).manual_seed(seed))
