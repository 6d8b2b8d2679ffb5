"""Stepping: from the entries and the state of a group to new weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from torch_simu.optimizer.entries import Entry, local
from torch_simu.optimizer.storage import allocate, read, write
from torch_simu.update import (
    clipped_step_,
    clipped_step_foreach_,
    clipped_update_,
    round_stochastically,
    unclipped_share,
)

_OPTIONS = ("rho", "eps", "clip")


def new_state(group: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """Return the state of a parameter before its first step."""
    state: dict[str, Any] = {}
    state["step"] = torch.zeros((), dtype=torch.float32, device=entry.grad.device if group["capturable"] else None)
    for key in ("exp_avg", "hessian"):
        allocate(state, key, entry, getattr(torch, group["state_dtype"]))
    if group["master_weights"] and entry.param.dtype in (torch.bfloat16, torch.float16):
        state["master"] = entry.stored(entry.gather(entry.param).to(torch.float32, copy=True))
    return state


def step_entries(
    group: Mapping[str, Any],
    entries: Sequence[Entry],
    states: Sequence[dict[str, Any]],
    finite: Tensor | bool,
    rounded: Callable[[Entry, Tensor], Tensor],
) -> None:
    """Make one step of a group.

    Args:
        group: Its options.
        entries: Of its parameters that have a gradient.
        states: Aligned with `entries`.
        finite: True, or a scalar on the device; where that is false nothing changes.
        rounded: From an entry and its new weights to the same in the parameter's dtype.
    """
    options: dict[str, Any] = {"lr": group["lr"], "beta1": group["betas"][0], **{key: group[key] for key in _OPTIONS}}
    decay = group["weight_decay"]
    if isinstance(finite, Tensor):
        options["lr"] = finite * options["lr"]
    reads = [_read(group, entry, state, finite) for entry, state in zip(entries, states, strict=True)]
    foreach = group["foreach"] if group["foreach"] is not None else all(grad.is_cuda for grad, _, _ in reads)
    one_kind = len({(grad.device, grad.dtype) for grad, _, _ in reads}) == 1
    if foreach and one_kind:
        weights = [_weight(entry, state) for entry, state in zip(entries, states, strict=True)]
        clipped_step_foreach_(weights, *map(list, zip(*reads, strict=True)), weight_decay=decay, **options)
        for entry, weight in zip(entries, weights, strict=True):
            _write(entry, weight, finite, rounded)
    else:
        for entry, state, work in zip(entries, states, reads, strict=True):
            if _adds(group, entry, state, finite):
                entry.add(clipped_update_(*work, **{**options, "lr": -options["lr"]}))
            else:
                weight = _weight(entry, state)
                clipped_step_(weight, *work, weight_decay=decay, **options)
                _write(entry, weight, finite, rounded)
    for state, (_, exp_avg, _) in zip(states, reads, strict=True):
        write(state, "exp_avg", exp_avg)
        state["step"] += 1 if finite is True else cast("Tensor", finite).to(state["step"].device)


def _read(
    group: Mapping[str, Any], entry: Entry, state: Mapping[str, Any], finite: Tensor | bool
) -> tuple[Tensor, Tensor, Tensor]:
    exp_avg, hessian = (read(state, key, entry.grad.dtype) for key in ("exp_avg", "hessian"))
    grad = -entry.grad if group["maximize"] else entry.grad
    if isinstance(finite, Tensor):
        # lerp(m, m) is m exactly, and a step of length zero keeps the weight: nothing changes, without a sync.
        grad = torch.where(finite.to(grad.device), grad, exp_avg)
    return grad, exp_avg, hessian


def _weight(entry: Entry, state: Mapping[str, Any]) -> Tensor:
    weight = local(state["master"]) if "master" in state else entry.gather(entry.param)
    return weight.to(entry.grad.dtype)


def _write(entry: Entry, weight: Tensor, finite: Tensor | bool, rounded: Callable[[Entry, Tensor], Tensor]) -> None:
    if weight is local(entry.param):
        return
    value = rounded(entry, weight)
    if isinstance(finite, Tensor):
        # Another draw would move a weight that the step must leave alone.
        value = torch.where(finite.to(value.device), value, entry.gather(entry.param))
    entry.write(value)


def _adds(group: Mapping[str, Any], entry: Entry, state: Mapping[str, Any], finite: Tensor | bool) -> bool:
    """Say whether the step is added to the weights instead of written: it spares reading the scattered columns once."""
    plain = "master" not in state and entry.param.dtype == entry.grad.dtype and not entry.grad.is_cuda
    return plain and finite is True and group["weight_decay"] == 0 and entry.addable


def fold(group: Mapping[str, Any], state: dict[str, Any], estimate: Tensor, finite: Tensor | bool) -> None:
    """Average a curvature estimate into the state, where it is finite."""
    current = read(state, "hessian", estimate.dtype)
    if isinstance(finite, Tensor):
        estimate = torch.where(finite.to(current.device), estimate, current)
    write(state, "hessian", current.lerp(estimate, 1 - group["betas"][1]))


def rounded_to(group: Mapping[str, Any], entry: Entry, weight: Tensor) -> Tensor:
    """Return new weights in the parameter's dtype, rounded as the group says."""
    dtype = entry.param.dtype
    if not group["stochastic_rounding"] or dtype not in (torch.bfloat16, torch.float16):
        return weight.to(dtype)
    # Seeded by what the checkpoint carries, so that a resumed run draws what the unbroken one would have drawn.
    seed = group["num_steps"] * 1_000_003 + entry.number * 10_007 + entry.position
    return round_stochastically(weight, dtype, torch.Generator(weight.device).manual_seed(seed))


def health(group: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> tuple[float | None, float, float]:
    """Return the share of unclipped entries of a group and the norms of its momentum and curvature."""
    pairs = [(read(state, "exp_avg", torch.float32), read(state, "hessian", torch.float32)) for state in states]
    pairs = [pair for pair in pairs if pair[0].numel()]
    total = sum(momentum.numel() for momentum, _ in pairs)
    options = {key: group[key] for key in ("rho", "eps", "clip")}
    unclipped = sum(unclipped_share(*pair, **options).item() * pair[0].numel() for pair in pairs)
    norms = [sum(torch.linalg.vector_norm(pair[which]).item() ** 2 for pair in pairs) ** 0.5 for which in (0, 1)]
    return unclipped / total if total else None, norms[0], norms[1]
