"""State: what the optimizer keeps of one parameter, and how curvature comes into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_simu.optimizer.entries import Entry, stored
from torch_simu.optimizer.groups import WHITENED
from torch_simu.optimizer.storage import allocate, read, write

HALF = (torch.bfloat16, torch.float16)


def new_state(group: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """Return the state of a parameter before its first step."""
    state: dict[str, Any] = {}
    state["step"] = torch.zeros((), dtype=torch.float32, device=step_device(group, entry.grad.device))
    for key in ("exp_avg",) if group["curvature"] in WHITENED else ("exp_avg", "hessian"):
        allocate(state, key, entry, getattr(torch, group["state_dtype"]))
    if group["master_weights"] and entry.param.dtype in HALF:
        state["master"] = stored(entry.gather().to(torch.float32, copy=True), entry.param, entry.columns)
    return state


def step_device(group: Mapping[str, Any], device: torch.device) -> torch.device:
    """Return where a parameter's steps are counted: with it, so that the device need not be read."""
    return device if group["capturable"] else torch.device("cpu") if device.type == "cpu" else device


def state_of(states: Mapping[Tensor, dict[str, Any]], group: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """Return the state of a parameter, made anew before its first step."""
    state = states[entry.param]
    if not state:
        state.update(new_state(group, entry))
    return state


def fold(group: Mapping[str, Any], state: dict[str, Any], estimate: Tensor, finite: Tensor | bool) -> None:
    """Average a curvature estimate into the state, where it is finite."""
    current = read(state, "hessian", estimate.dtype)
    if isinstance(finite, Tensor):
        estimate = torch.where(finite.to(current.device), estimate, current)
    write(state, "hessian", current.lerp(estimate, 1 - group["betas"][1]))
