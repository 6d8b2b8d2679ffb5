"""Group: one step and one refresh of a group, by its curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from torch_simu.optimizer.counters import count_step, place_counters, schedule_refresh, steps_left
from torch_simu.optimizer.entries import Entry
from torch_simu.optimizer.groups import WHITENED
from torch_simu.optimizer.stepping.clipped import clip_entries
from torch_simu.optimizer.stepping.directions import Directions
from torch_simu.optimizer.stepping.fused import check_fused, fuse_entries
from torch_simu.optimizer.stepping.state import fold, state_of
from torch_simu.optimizer.stepping.trust import make_room, trust_entries, waits_for_state


def step_group(
    group: dict[str, Any],
    entries: Sequence[Entry],
    states: Mapping[Tensor, dict[str, Any]],
    finite: Tensor | bool,
    directions: Directions,
) -> None:
    """Make one step of a group and count it, where `finite` is true; `directions` are those whitened before."""
    # Again, because groups are dictionaries that anyone may change, and parameters move.
    check_fused(group)
    own = [state_of(states, group, entry) for entry in entries]
    if group["curvature"] in WHITENED and waits_for_state(group):
        make_room(group, entries, own)
        return
    # Before the step, whose draws go by the counter.
    place_counters(group, finite)
    refreshed = group["curvature"] == "squared_gradient" and finite & (steps_left([group]) <= 1)
    if refreshed is not False:
        for entry, state in zip(entries, own, strict=True):
            fold(group, state, entry.grad.square(), refreshed)
    if group["curvature"] in WHITENED:
        trust_entries(group, entries, own, finite, directions)
    else:
        (fuse_entries if group["fused"] else clip_entries)(group, entries, own, finite)
    count_step(group, finite)
    if refreshed is not False:
        schedule_refresh(group, refreshed)


def refresh_group(
    group: dict[str, Any],
    means: Mapping[Tensor, tuple[Entry, Tensor]],
    states: Mapping[Tensor, dict[str, Any]],
    finite: Tensor | bool,
) -> None:
    """Fold curvature estimates into the state of a group, where `finite` is true; else the refresh stays due."""
    for entry, mean in (means[param] for param in group["params"] if param in means):
        fold(group, state_of(states, group, entry), mean, finite)
    schedule_refresh(group, finite)
