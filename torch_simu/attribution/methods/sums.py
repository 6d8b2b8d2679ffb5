"""LayerSum: what one layer contributes over some samples, and how gradients become it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import cast

import torch
from torch import Tensor, nn

from torch_simu.attribution.methods.budget import Chunks
from torch_simu.attribution.methods.memory import Memory
from torch_simu.attribution.path import Path
from torch_simu.attribution.sequences import ScoredSequence
from torch_simu.attribution.site import Site

Method = Callable[
    [nn.Module, Sequence[ScoredSequence], Mapping[str, nn.Module], Path, Memory], Iterator[tuple[str, "LayerSum"]]
]
"""A way to attribute: from model, rows, layers, path and memory to one sum per layer, in the order of the layers."""


class NotApplicableError(ValueError):
    """The method would give a wrong result on this model or these rows."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerSum:
    """Sums over samples of one layer.

    Attributes:
        scores: Attribution of each neuron, in units of the objective. Shape: `(num_neurons,)`, float64 on the CPU.
        completeness_error: Sum of the scores minus the change of the objective along the path.
        change_size: Sum over samples of the size of that change, but of each at least what the model's precision tells.
        variance: Of the scores, where they are an estimate. Shape: as `scores`.
        difference: Half of what two halves of an estimate differ by. Shape: as `scores`.
        visits: How many samples changed the layer for the estimate.
        unmeasured: How many exact samples were summed without their change.
    """

    scores: Tensor
    completeness_error: float = 0.0
    change_size: float = 0.0
    variance: Tensor | None = None
    difference: Tensor | None = None
    visits: int = 0
    unmeasured: int = 0

    @classmethod
    def zero(cls, num_neurons: int, *, estimated: bool = False) -> LayerSum:
        """Return the sum over no samples, of an estimate or not."""
        nothing = torch.zeros(num_neurons, dtype=torch.float64)
        # Each of its own, because tensors that share memory cannot be saved.
        return cls(nothing, variance=nothing.clone(), difference=nothing.clone()) if estimated else cls(nothing)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], error: float, size: float, *counts: float) -> LayerSum:
        """Return the sum with some `tensors`, and its numbers in order."""
        scores, variance, difference = tensors if len(tensors) > 1 else (tensors[0], None, None)
        return cls(scores, error, size, variance, difference, *map(round, counts))

    @property
    def numbers(self) -> list[float]:
        """Error, size and counts."""
        return [self.completeness_error, self.change_size, self.visits, self.unmeasured]

    @property
    def tensors(self) -> list[Tensor]:
        """The scores, and of an estimate `variance` and `difference`, too."""
        return [each for each in (self.scores, self.variance, self.difference) if each is not None]

    def __add__(self, other: LayerSum) -> LayerSum:
        return LayerSum(
            self.scores + other.scores,
            self.completeness_error + other.completeness_error,
            self.change_size + other.change_size,
            _added(self.variance, other.variance),
            _added(self.difference, other.difference),
            self.visits + other.visits,
            self.unmeasured + other.unmeasured,
        )


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other


def path_sums(
    model: nn.Module,
    evaluate: Callable[[list[float], slice], tuple[Tensor, Mapping[str, Site]]],
    path: Path,
    chunks: Chunks,
    num_queries: int = 1,
    clean: Tensor | None = None,
    *,
    apart: bool = False,
) -> dict[str, LayerSum]:
    """Integrate along a path that some layers are on.

    Args:
        model: The model, for its precision.
        evaluate: From path points and a range of queries to F, and the scaled layers. Shape of F:
            `(num_alphas, 1, num_values)` where all layers are on the path together, `(num_alphas, num_layers,
            num_values)` where each is on its own. There is one value for each query, or one query for all values.
        path: Objective and path points.
        chunks: How many points and queries go through one pass.
        num_queries: What the ranges are cut from.
        clean: F of each value at the end of the path, where it is known. Shape: `(num_values,)`.
        apart: Whether the ends take passes of their own, without a gradient. Else they are measured on the way: where
            a pass holds little, a stream more costs less than another pass.

    Returns:
        Layer -> its sum; where all are together, error and change of each are those of all.
    """
    points = [*path.alphas, *path.ends[: 1 if clean is not None else 2]]
    ends: dict[int, list[tuple[int, Tensor]]] = {number: [] for number in range(path.steps, len(points))}
    totals: dict[str, Tensor] = {}
    weights = torch.tensor(path.weights, dtype=torch.float64)[:, None, None]

    def one(which: slice, queries: slice, first: int = 0) -> dict[str, Tensor]:
        which = slice(first + which.start, first + which.stop)
        alphas = points[which]
        inner = min(len(alphas), path.steps - which.start)
        with torch.set_grad_enabled(inner > 0):
            values, sites = evaluate(alphas, queries)
        found: dict[str, Tensor] = {}
        if inner > 0:
            leaves = [cast("Tensor", site.leaf) for site in sites.values()]
            weighted = weights[which][:inner].to(values) * values[:inner]
            gradients = torch.autograd.grad(weighted.sum(), leaves)
            pairs = zip(sites.items(), gradients, strict=True)
            found = {name: site.scores(gradient[:inner]) for (name, site), gradient in pairs}
        for number in ends.keys() & range(which.start, which.stop):
            ends[number].append((queries.start, values[number - which.start].detach().double().cpu()))
        return found

    begins = [0, path.steps] if apart else [0]
    for begin, end in zip(begins, [*begins[1:], len(points)], strict=True):
        for scores in chunks.run(partial(one, first=begin), end - begin, num_queries) if end > begin else ():
            for name, score in scores.items():
                totals[name] = totals[name] + score if name in totals else score
    means = {name: total / path.steps for name, total in totals.items()}
    if not ends:
        return {name: LayerSum(mean, unmeasured=num_queries) for name, mean in means.items()}
    found = [torch.cat([each for _, each in sorted(ends[number], key=itemgetter(0))], dim=1) for number in sorted(ends)]
    start, end_values = found[0], found[-1] if clean is None else clean.detach().double().cpu()[None]
    change = end_values - start
    told = torch.maximum(change.abs(), _precision(model) * torch.maximum(start.abs(), end_values.abs())).sum(1)
    scored = torch.stack([mean.sum() for mean in means.values()])
    errors = (scored if len(change) == len(means) else scored.sum()) - change.sum(1)
    rows = zip(errors.expand(len(means)).tolist(), told.expand(len(means)).tolist(), strict=True)
    return {name: LayerSum(mean, *row) for (name, mean), row in zip(means.items(), rows, strict=True)}


def _precision(model: nn.Module) -> float:
    """Return the share of F below which the model's rounding hides a change."""
    # Layers with 8-bit codes round activations, too.
    dtypes = {torch.bfloat16 if param.dtype == torch.int8 else param.dtype for param in model.parameters()}
    return max([1e-4, *(16 * torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)])
