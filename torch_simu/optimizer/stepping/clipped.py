"""Clipped steps: Sophia, by the diagonal curvature of each entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_simu.optimizer.entries import Entry
from torch_simu.optimizer.stepping.writing import adds, selected_weight, step_size, write_weight
from torch_simu.optimizer.storage import read, write
from torch_simu.update import clipped_step_, clipped_step_foreach_, clipped_update_

_OPTIONS = ("rho", "eps", "clip")


def clip_entries(
    group: Mapping[str, Any], entries: Sequence[Entry], states: Sequence[dict[str, Any]], finite: Tensor | bool
) -> None:
    """Make one step of a group.

    Args:
        group: Its options.
        entries: Of its parameters that have a gradient.
        states: Aligned with `entries`.
        finite: True, or a scalar on the device; where that is false nothing changes.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[Entry, dict[str, Any]]]] = {}
    for entry, state in zip(entries, states, strict=True):
        kinds.setdefault((entry.grad.device, entry.grad.dtype), []).append((entry, state))
    for (device, _), pairs in kinds.items():
        _step_kind(group, pairs, finite.to(device) if isinstance(finite, Tensor) else True)


def _step_kind(group: Mapping[str, Any], pairs: list[tuple[Entry, dict[str, Any]]], finite: Tensor | bool) -> None:
    """Step entries of one device and one dtype."""
    device = pairs[0][0].grad.device
    reads = [_read(group, entry, state, finite) for entry, state in pairs]
    options: dict[str, Any] = {"beta1": group["betas"][0], **{key: group[key] for key in _OPTIONS}}
    options["lr"], decay = step_size(group["lr"], finite), group["weight_decay"]
    if group["foreach"] if group["foreach"] is not None else device.type == "cuda":
        weights = [selected_weight(entry, state) for entry, state in pairs]
        clipped_step_foreach_(weights, *map(list, zip(*reads, strict=True)), weight_decay=decay, **options)
        for (entry, _), weight in zip(pairs, weights, strict=True):
            write_weight(group, entry, weight, finite)
    else:
        for (entry, state), work in zip(pairs, reads, strict=True):
            if adds(group, entry, state, finite):
                entry.add(clipped_update_(*work, **{**options, "lr": -options["lr"]}))
            else:
                weight = selected_weight(entry, state)
                clipped_step_(weight, *work, weight_decay=decay, **options)
                write_weight(group, entry, weight, finite)
    for (_, state), (_, exp_avg, _) in zip(pairs, reads, strict=True):
        write(state, "exp_avg", exp_avg)
        state["step"] += finite if isinstance(finite, Tensor) else 1


def _read(
    group: Mapping[str, Any], entry: Entry, state: Mapping[str, Any], finite: Tensor | bool
) -> tuple[Tensor, Tensor, Tensor]:
    exp_avg, hessian = (read(state, key, entry.grad.dtype) for key in ("exp_avg", "hessian"))
    grad = -entry.grad if group["maximize"] else entry.grad
    if isinstance(finite, Tensor):
        # lerp(m, m) is m exactly, and a step of length zero keeps the weight: nothing changes, without a sync.
        grad = torch.where(finite, grad, exp_avg)
    return grad, exp_avg, hessian
