"""Stepping: from the entries and the state of a group to new weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_simu.optimizer.counters import count_step, due, place_counters, schedule_refresh
from torch_simu.optimizer.entries import Entry, local, stored
from torch_simu.optimizer.storage import allocate, read, write
from torch_simu.update import (
    clipped_step_,
    clipped_step_foreach_,
    clipped_update_,
    counted_uniform,
    round_by,
    round_stochastically,
    unclipped_share,
)

_OPTIONS = ("rho", "eps", "clip")
_HALF = (torch.bfloat16, torch.float16)


def new_state(group: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """Return the state of a parameter before its first step."""
    state: dict[str, Any] = {}
    state["step"] = torch.zeros((), dtype=torch.float32, device=step_device(group, entry.grad.device))
    for key in ("exp_avg", "hessian"):
        allocate(state, key, entry, getattr(torch, group["state_dtype"]))
    if group["master_weights"] and entry.param.dtype in _HALF:
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


def step_group(
    group: dict[str, Any], entries: Sequence[Entry], states: Mapping[Tensor, dict[str, Any]], finite: Tensor | bool
) -> None:
    """Make one step of a group and count it, where `finite` is true."""
    # Before the step, whose draws go by the counter.
    place_counters(group, finite)
    own = [state_of(states, group, entry) for entry in entries]
    refreshed = group["curvature"] == "squared_gradient" and due([group], ahead=1) & finite
    if refreshed is not False:
        for entry, state in zip(entries, own, strict=True):
            fold(group, state, entry.grad.square(), refreshed)
    step_entries(group, entries, own, finite)
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


def step_entries(
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
    options["lr"], decay = _rate(group["lr"], finite), group["weight_decay"]
    if group["foreach"] if group["foreach"] is not None else device.type == "cuda":
        weights = [_weight(entry, state) for entry, state in pairs]
        clipped_step_foreach_(weights, *map(list, zip(*reads, strict=True)), weight_decay=decay, **options)
        for (entry, _), weight in zip(pairs, weights, strict=True):
            _write(group, entry, weight, finite)
    else:
        for (entry, state), work in zip(pairs, reads, strict=True):
            if _adds(group, entry, state, finite):
                entry.add(clipped_update_(*work, **{**options, "lr": -options["lr"]}))
            else:
                weight = _weight(entry, state)
                clipped_step_(weight, *work, weight_decay=decay, **options)
                _write(group, entry, weight, finite)
    for (_, state), (_, exp_avg, _) in zip(pairs, reads, strict=True):
        write(state, "exp_avg", exp_avg)
        state["step"] += finite if isinstance(finite, Tensor) else 1


def _rate(lr: float | Tensor, finite: Tensor | bool) -> float | Tensor:
    """Return the step size as a number or a scalar: zero where nothing may change."""
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    if not isinstance(finite, Tensor):
        return lr
    # A number is a float64 on the host as well.
    return finite * lr if isinstance(lr, Tensor) else finite.double() * lr


def _read(
    group: Mapping[str, Any], entry: Entry, state: Mapping[str, Any], finite: Tensor | bool
) -> tuple[Tensor, Tensor, Tensor]:
    exp_avg, hessian = (read(state, key, entry.grad.dtype) for key in ("exp_avg", "hessian"))
    grad = -entry.grad if group["maximize"] else entry.grad
    if isinstance(finite, Tensor):
        # lerp(m, m) is m exactly, and a step of length zero keeps the weight: nothing changes, without a sync.
        grad = torch.where(finite, grad, exp_avg)
    return grad, exp_avg, hessian


def _weight(entry: Entry, state: Mapping[str, Any]) -> Tensor:
    weight = local(state["master"]) if "master" in state else entry.gather()
    return weight.to(entry.grad.dtype)


def _write(group: Mapping[str, Any], entry: Entry, weight: Tensor, finite: Tensor | bool) -> None:
    if weight is local(entry.param):
        return
    value = rounded_to(group, entry, weight)
    if isinstance(finite, Tensor):
        # Another draw would move a weight that the step must leave alone.
        value = torch.where(finite, value, entry.gather())
    entry.write(value)


def _adds(group: Mapping[str, Any], entry: Entry, state: Mapping[str, Any], finite: Tensor | bool) -> bool:
    """Say whether the step is added to the weights instead of written: it spares reading the scattered columns once."""
    plain = "master" not in state and entry.param.dtype == entry.grad.dtype and not entry.grad.is_cuda
    return plain and finite is True and group["weight_decay"] == 0 and entry.columns.indices is not None


def fold(group: Mapping[str, Any], state: dict[str, Any], estimate: Tensor, finite: Tensor | bool) -> None:
    """Average a curvature estimate into the state, where it is finite."""
    current = read(state, "hessian", estimate.dtype)
    if isinstance(finite, Tensor):
        estimate = torch.where(finite.to(current.device), estimate, current)
    write(state, "hessian", current.lerp(estimate, 1 - group["betas"][1]))


def rounded_to(group: Mapping[str, Any], entry: Entry, weight: Tensor) -> Tensor:
    """Return new weights in the parameter's dtype, rounded as the group says."""
    dtype = entry.param.dtype
    if not group["stochastic_rounding"] or dtype not in _HALF:
        return weight.to(dtype)
    # Seeded by what the checkpoint carries, so that a resumed run draws what the unbroken one would have drawn.
    seed = group["num_steps"] * 1_000_003 + entry.salt
    if isinstance(seed, Tensor):
        # A generator's seed is a number of the host, which a replayed CUDA graph would use again and again.
        return round_by(weight, dtype, counted_uniform(weight.shape, seed.to(weight.device)))
    return round_stochastically(weight, dtype, torch.Generator(weight.device).manual_seed(seed))


def health(groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the share of unclipped entries of each group and the norms of its momentum and curvature."""
    figures = [_health(group, [states[param] for param in group["params"] if states.get(param)]) for group in groups]
    names = ("unclipped", "momentum_norm", "curvature_norm")
    return {name: list(column) for name, column in zip(names, zip(*figures, strict=True), strict=True)}


def _health(group: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> tuple[float | None, float, float]:
    pairs = [(read(state, "exp_avg", torch.float32), read(state, "hessian", torch.float32)) for state in states]
    pairs = [pair for pair in pairs if pair[0].numel()]
    total = sum(momentum.numel() for momentum, _ in pairs)
    options = {key: group[key] for key in _OPTIONS}
    unclipped = sum(unclipped_share(*pair, **options).item() * pair[0].numel() for pair in pairs)
    norms = [sum(torch.linalg.vector_norm(pair[which]).item() ** 2 for pair in pairs) ** 0.5 for which in (0, 1)]
    return unclipped / total if total else None, norms[0], norms[1]
