"""Passes of an estimate: one forward and backward pass in which every sample changes another layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from torch_simu.attribution.estimate.design import Design
from torch_simu.attribution.methods.budget import Chunks
from torch_simu.attribution.methods.rows import Rows
from torch_simu.attribution.methods.sums import LayerSum
from torch_simu.attribution.site import Site

_Found = dict[str, Tensor]
"""Layer -> activation times gradient. Shape of each: `(num_samples, num_neurons)`, float64 on the CPU."""


class Passes:
    r"""An estimate of the sums of all layers over some samples, which grows pass by pass.

    With $x_i(\alpha) = \beta_i \, \partial F_i / \partial a$ at $a = \alpha \beta_i$, the sum of a layer is
    $\sum_i \int_0^1 x_i$. Nothing is changed at $\alpha = 1$, so the first pass gives $x_i(1)$ of all layers together.
    In each of $K$ further passes sample $i$ changes one of $L$ layers, $l_i$, to one point, $\alpha_i$, which `Design`
    draws, and

    $$\sum_i x_i(1) + \frac{L}{K} \sum_{\text{passes}} \sum_{i: \, l_i = l}
    \frac{x_i(\alpha_i) - x_i(1)}{2 (1 - \alpha_i)}$$

    has the sum of layer $l$ as its mean: each layer is drawn with probability $1/L$, and each point with the density
    $2 (1 - \alpha)$. Where $x_i$ is linear in $\alpha$, any point alone gives the integral. No sample sees what another
    one changes.

    Args:
        rows: The samples, in a frozen model.
        layers: Name -> module.
        generator: Source of randomness, on the CPU.
    """

    def __init__(self, rows: Sequence[Rows], layers: Mapping[str, nn.Module], generator: torch.Generator) -> None:
        self.rows, self.layers, self.done = rows, layers, 0
        self._designs = [Design.draw(len(layers), each.count, generator) for each in rows]
        self._ends: list[_Found] = []
        self._visits: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts = dict.fromkeys(layers, 0)

    def run(self) -> None:
        """Make one more pass over all samples; at most one more than there are layers."""
        for number, rows in enumerate(self.rows):
            if self.done == 0:
                parts = list(Chunks(1, rows.most).run(partial(self._end, rows), 1, rows.count))
                ends = {name: torch.cat([each[name] for each in parts]).float() for name in self.layers}
                self._ends.append(ends)
            else:
                visit = partial(self._visit, rows, self._designs[number], self._ends[number])
                for found in Chunks(1, rows.most).run(visit, 1, rows.count):
                    for name, moments, count in found:
                        self._sums[name] = self._sums[name] + moments if name in self._sums else moments
                        self._counts[name] += count
        self.done += 1

    def sums(self) -> dict[str, LayerSum]:
        """Return the estimate of each layer's sum from the passes made so far, two at least."""
        weight = len(self.layers) / (self.done - 1)
        found = {}
        for name in self.layers:
            end = torch.stack([each[name].double().sum(0) for each in self._ends]).sum(0)
            nothing = torch.zeros(3, len(end), dtype=torch.float64)
            total, squares, difference = weight * self._sums.get(name, nothing)
            variance, count = weight * squares, self._counts[name]
            if count > 1:
                variance = (variance - total.square() / count) * (count / (count - 1))
            found[name] = LayerSum(
                end + total, variance=variance.clamp(min=0.0), difference=difference, visits=self._counts[name]
            )
        return found

    def _end(self, rows: Rows, _: slice, part: slice) -> _Found:
        """Return what each sample of a part gives to every layer where nothing is changed."""
        every = torch.arange(part.stop - part.start)
        ones = torch.ones(1, len(every), dtype=torch.float64)
        return self._through(rows, part, {name: (every, ones) for name in self.layers}, _added)

    def _visit(self, rows: Rows, design: Design, ends: _Found, _: slice, part: slice) -> list[tuple[str, Tensor, int]]:
        """Return sums over the samples of a part, for each layer: of what they give, its squares, and by halves."""
        layer, alpha, half = (each[self.done - 1, part] for each in (design.layer, design.alpha, design.half))
        which = {name: (layer == number).nonzero()[:, 0] for number, name in enumerate(self.layers)}
        changed = {name: (rows_, alpha[rows_][None]) for name, rows_ in which.items() if len(rows_)}
        found = []
        for name, values in self._through(rows, part, changed, _replaced).items():
            visited = which[name]
            change = (values - ends[name][part][visited]) / (2.0 * (1.0 - alpha[visited]))[:, None]
            moments = torch.stack([change.sum(0), change.square().sum(0), half[visited] @ change])
            found.append((name, moments, len(visited)))
        return found

    def _through(
        self,
        rows: Rows,
        part: slice,
        changed: Mapping[str, tuple[Tensor, Tensor]],
        place: Callable[[tuple[Tensor, ...], Tensor, Tensor], Tensor],
    ) -> _Found:
        """Run a part of the samples forward and backward.

        Args:
            rows: The samples.
            part: Which of them.
            changed: Layer -> the samples of the part that it changes, and their path points.
            place: From their places, the scaled activations and all activations to what the layer gets.
        """
        streams, tokens = rows.grid(part.stop - part.start)
        sites = []
        with ExitStack() as stack:
            for name, (which, alpha) in changed.items():
                at = rows.at(which)
                pick, put = partial(_picked, at), partial(place, at)
                sites.append(Site(name, self.layers[name], streams, tokens, alpha, pick, put))
                stack.enter_context(sites[-1].scaled())
            values = rows.values(part)
        leaves = [site.leaf for site in sites if site.leaf is not None]
        gradients = torch.autograd.grad(values.sum(), leaves)
        return {site.name: site.scores_of_each(gradient) for site, gradient in zip(sites, gradients, strict=True)}


def _picked(at: tuple[Tensor, ...], whole: Tensor) -> Tensor:
    return whole[tuple(each.to(whole.device) for each in at)]


def _replaced(at: tuple[Tensor, ...], leaf: Tensor, whole: Tensor) -> Tensor:
    return whole.index_put(tuple(each.to(whole.device) for each in at), leaf[0])


def _added(at: tuple[Tensor, ...], leaf: Tensor, whole: Tensor) -> Tensor:
    # Nothing is added, but for the gradient, which goes on to the layers below.
    return _replaced(at, (leaf - leaf.detach() + _picked(at, whole)), whole)
