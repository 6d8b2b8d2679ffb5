"""Exact attribution by definition: one forward and backward pass per prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from torch_simu.attribution.budget import byte_budget, bytes_per_token
from torch_simu.attribution.intervention import device_of, logits_at, replaced_input
from torch_simu.attribution.path import Path
from torch_simu.attribution.rows import Row
from torch_simu.attribution.sums import LayerSum, attributed, scaled


def prefix_sums(
    model: nn.Module, rows: Sequence[Row], layers: Mapping[str, nn.Module], path: Path
) -> Iterator[tuple[str, LayerSum]]:
    """Yield the exact sum of each layer over all samples of the rows, for any causal model.

    Args:
        model: A causal language model, frozen; only `input_ids` is passed to it.
        rows: Sequences with samples. Prefixes of equal length share a pass.
        layers: Name -> module.
        path: Objective and path points.
    """
    per_token = bytes_per_token(model)
    budget = byte_budget(model)
    for name, module in layers.items():
        total = torch.zeros((), dtype=torch.float64)
        change = 0.0
        for ids, targets in prefixes(rows, device_of(model)):
            size = max(1, budget // (per_token * ids.numel()))
            with torch.no_grad():
                ends, _, _ = _prefix_values(model, name, module, ids, targets, [0.0, 1.0], path)
            change += (ends[1] - ends[0]).double().sum().item()
            for first in range(0, path.steps, size):
                alphas = path.alphas[first : first + size]
                values, leaf, activation = _prefix_values(model, name, module, ids, targets, alphas, path)
                (gradient,) = torch.autograd.grad(values.sum(), leaf)
                total = total + attributed(gradient, activation)
        scores = total / path.steps
        yield name, LayerSum(scores, scores.sum().item() - change)


def prefixes(rows: Sequence[Row], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all prefixes, those of equal length together, as ids `(num_prefixes, length)` and targets."""
    groups: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for row in rows:
        for query, target in zip(row.queries.tolist(), row.targets, strict=True):
            groups.setdefault(query + 1, []).append((row.ids[: query + 1], target))
    for length in sorted(groups):
        ids, targets = zip(*groups[length], strict=True)
        yield torch.stack(ids).to(device), torch.stack(targets).to(device)


def _prefix_values(
    model: nn.Module, name: str, module: nn.Module, ids: Tensor, targets: Tensor, alphas: list[float], path: Path
) -> tuple[Tensor, Tensor, Tensor]:
    """Return F of each path point and prefix, the scaled activations, and the clean ones."""
    count, length = ids.shape
    found: dict[str, Tensor] = {}

    def replace(activation: Tensor) -> Tensor:
        found["activation"] = activation[:count, -1].detach()
        found["leaf"] = scaled(found["activation"], alphas)
        return torch.cat([activation[:, :-1], found["leaf"].flatten(0, 1)[:, None]], dim=1)

    with replaced_input(name, module, len(alphas) * count, length, replace):
        last = torch.tensor([length - 1], device=ids.device)
        logits = logits_at(model, last, input_ids=ids.repeat(len(alphas), 1), use_cache=False)
    values = path.values(logits[:, 0].reshape(len(alphas), count, -1), targets)
    return values, found["leaf"], found["activation"]
