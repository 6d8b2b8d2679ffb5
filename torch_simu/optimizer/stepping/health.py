"""Health: figures of momentum and curvature, read from the device when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_simu.optimizer.entries import local
from torch_simu.optimizer.groups import WHITENED
from torch_simu.optimizer.storage import FACTORS, read
from torch_simu.update import unclipped_share

_OPTIONS = ("rho", "eps", "clip")


def health(groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the share of unclipped entries of each group and the norms of its momentum and curvature."""
    figures = [_health(group, [states[param] for param in group["params"] if states.get(param)]) for group in groups]
    names = ("unclipped", "momentum_norm", "curvature_norm")
    return {name: list(column) for name, column in zip(names, zip(*figures, strict=True), strict=True)}


def _health(group: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> tuple[float | None, float, float]:
    if group["curvature"] in WHITENED:
        # Its momentum is of directions of length one; nothing is clipped by entry.
        kept = [
            [local(state["exp_avg"]) for state in states],
            [state[key] for state in states for key in FACTORS if key in state],
        ]
        return None, *(sum(torch.linalg.vector_norm(each).item() ** 2 for each in side) ** 0.5 for side in kept)
    pairs = [(read(state, "exp_avg", torch.float32), read(state, "hessian", torch.float32)) for state in states]
    pairs = [pair for pair in pairs if pair[0].numel()]
    total = sum(momentum.numel() for momentum, _ in pairs)
    options = {key: group[key] for key in _OPTIONS}
    unclipped = sum(unclipped_share(*pair, **options).item() * pair[0].numel() for pair in pairs)
    norms = [sum(torch.linalg.vector_norm(pair[which]).item() ** 2 for pair in pairs) ** 0.5 for which in (0, 1)]
    return unclipped / total if total else None, norms[0], norms[1]
