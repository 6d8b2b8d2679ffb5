"""LayerSum: what one layer contributes over some samples, and how gradients become it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from torch_simu.attribution.methods.budget import Chunks
from torch_simu.attribution.path import Path
from torch_simu.attribution.sequences import ScoredSequence
from torch_simu.attribution.site import Site

Method = Callable[
    [nn.Module, Sequence[ScoredSequence], Mapping[str, nn.Module], Path], Iterator[tuple[str, "LayerSum"]]
]
"""A way to attribute: from model, rows, layers and path to one sum per layer, in the order of the layers."""


class NotApplicableError(ValueError):
    """The method would give a wrong result on this model or these rows."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerSum:
    """Sums over samples of one layer.

    Attributes:
        scores: Attribution of each neuron, in units of the objective. Shape: `(num_neurons,)`, float64 on the CPU.
        completeness_error: Sum of the scores minus the change of the objective along the path.
    """

    scores: Tensor
    completeness_error: float

    def __add__(self, other: LayerSum) -> LayerSum:
        return LayerSum(self.scores + other.scores, self.completeness_error + other.completeness_error)


def path_sums(
    evaluate: Callable[[list[float], slice], tuple[Tensor, Mapping[str, Site]]],
    path: Path,
    chunks: Chunks,
    num_queries: int = 1,
    clean: float | None = None,
) -> dict[str, LayerSum]:
    """Integrate along a path that some layers are on.

    Args:
        evaluate: From path points and a range of queries to F, `(num_alphas, num_values)`, and the scaled layers.
        path: Objective and path points.
        chunks: How many points and queries go through one pass.
        num_queries: What the ranges are cut from.
        clean: The sum of F at the end of the path, where it is known.

    Returns:
        Layer -> its sum; the error of each is that of all together.
    """
    # Both ends are measured on the way: a stream more costs less than a pass of its own.
    points = [*path.alphas, 0.0] if clean is not None else [*path.alphas, 0.0, 1.0]
    change = clean or 0.0
    totals: dict[str, Tensor] = {}

    def one(which: slice, queries: slice) -> tuple[float, dict[str, Tensor]]:
        alphas = points[which]
        values, sites = evaluate(alphas, queries)
        ends = values.detach().double().sum(-1).tolist()
        moved = sum(end * {path.steps: -1, path.steps + 1: 1}.get(which.start + i, 0) for i, end in enumerate(ends))
        inner = min(len(alphas), path.steps - which.start)
        if inner <= 0:
            return moved, {}
        leaves = [cast("Tensor", site.leaf) for site in sites.values()]
        gradients = torch.autograd.grad(values[:inner].sum(), leaves)
        found = zip(sites.items(), gradients, strict=True)
        return moved, {name: site.scores(gradient[:inner]) for (name, site), gradient in found}

    for moved, scores in chunks.run(one, len(points), num_queries):
        change += moved
        for name, score in scores.items():
            totals[name] = totals[name] + score if name in totals else score
    means = {name: total / path.steps for name, total in totals.items()}
    error = sum(mean.sum().item() for mean in means.values()) - change
    return {name: LayerSum(mean, error) for name, mean in means.items()}
