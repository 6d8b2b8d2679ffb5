"""Counters: how many steps a group has made and when its next refresh is due, on the host or on the device.

They are in the groups, so that every way of saving and loading an optimizer carries them. Where a step decides on the
device whether it changes anything, only the device knows how many were made: the counters are tensors there, changed in
place, so that a replayed CUDA graph counts too. A saved state holds plain numbers always, which load anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_COUNTERS = ("num_steps", "next_refresh")


def count_step(group: dict[str, Any], finite: Tensor | bool) -> None:
    """Count a step, if it changed anything."""
    group["num_steps"] += finite.to(group["num_steps"].device) if isinstance(finite, Tensor) else 1


def schedule_refresh(group: dict[str, Any], refreshed: Tensor | bool) -> None:
    """Let the next refresh be due an interval from now, if the curvature was refreshed."""
    place_counters(group, refreshed)
    _set_next(group, group["num_steps"] + group["hessian_interval"], refreshed)


def unrefreshed(group: Mapping[str, Any]) -> bool:
    """Say whether a group that needs a refresh before its first step had none; its counters are on the host then."""
    return not isinstance(group["next_refresh"], Tensor) and group["next_refresh"] == 0


def make_due(group: dict[str, Any]) -> None:
    """Let a refresh be due now."""
    _set_next(group, group["num_steps"], True)


def steps_left(groups: Iterable[Mapping[str, Any]]) -> Tensor | int:
    """Return how many steps from now the first refresh of some groups is due; 1 without groups."""
    left = [group["next_refresh"] - group["num_steps"] for group in groups]
    tensors = [each for each in left if isinstance(each, Tensor)]
    host = min((each for each in left if not isinstance(each, Tensor)), default=None)
    if not tensors:
        return 1 if host is None else host
    first = torch.stack([each.to(tensors[0].device) for each in tensors]).min()
    return first if host is None else first.clamp(max=host)


def place_counters(group: dict[str, Any], finite: Tensor | bool) -> None:
    """Move the counters of a group to the device, where the device decides."""
    if isinstance(finite, Tensor):
        for key in _COUNTERS:
            if not isinstance(group[key], Tensor):
                group[key] = torch.full((), group[key], dtype=torch.int64, device=finite.device)


def plain_counters(groups: Iterable[dict[str, Any]]) -> None:
    """Make plain numbers of the counters."""
    for group in groups:
        group.update({key: int(group[key]) for key in _COUNTERS if isinstance(group.get(key), Tensor)})


def _set_next(group: dict[str, Any], value: Tensor | int, chosen: Tensor | bool) -> None:
    kept = group["next_refresh"]
    if not isinstance(kept, Tensor):
        group["next_refresh"] = int(value)
    elif isinstance(chosen, Tensor):
        kept.copy_(torch.where(chosen.to(kept.device), value, kept))
    else:
        kept.copy_(value) if isinstance(value, Tensor) else kept.fill_(value)
