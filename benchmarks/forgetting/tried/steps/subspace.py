"""Selection by direction: steps in a subspace of the neurons' activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.tried.loop import Loop
from torch_simu import register_neuron_hooks
from torch_simu.layers import down_projections
from torch_simu.unlearning.data.batches import batches_in_order
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.objectives import mean_answer_nll
from torch_simu.whitening import damped_cholesky

FLOOR = 0.01
"""Damping of the retain covariance."""


class Projected(Loop):
    """Steps in the span of some generalized eigenvectors of the forget covariance against the retain covariance.

    Leading ones are directions that the activations of the forget set use and those of the retain set do not. The
    covariances are those of the model as it was; a step keeps its length.

    Args:
        case: As of a `Loop`, like the seed.
        seed: Of the batches.
        share: Of all directions, this share trains.
        leading: Whether it is the leading ones, or the trailing.
        options: Of a `Loop`.
    """

    def __init__(self, case: Case, seed: int, *, share: float, leading: bool, **options: Any) -> None:
        super().__init__(case, seed, **options)
        forget, retain = (covariances(self.model, case.sets[name]) for name in ("forget", "retain"))
        layers = down_projections(self.model)
        self.bases = {
            layers[name].weight: basis(forget[name], retain[name], share=share, leading=leading) for name in forget
        }

    @torch.no_grad()
    def step(self) -> None:
        old = {param: param.clone() for param in self.bases}
        super().step()
        for param, columns in self.bases.items():
            change = param - old[param]
            inside = change @ columns @ columns.T
            param.copy_(old[param] + inside * (change.norm() / inside.norm().clamp(min=1e-12)))


def covariances(model: PreTrainedModel, rows: Sequence[Example]) -> Mapping[str, Tensor]:
    """Layer -> covariance of its neurons over the scored positions of rows."""
    with register_neuron_hooks(model, reduce="covariance") as hooks:
        for batch in batches_in_order(rows, 24, 0):
            mean_answer_nll(model, batch).backward()
            model.zero_grad()
    return dict(hooks)


def basis(forget: Tensor, retain: Tensor, *, share: float, leading: bool) -> Tensor:
    """An orthonormal basis, as columns, of the span of some directions.

    Examples:
        >>> basis(torch.diag(torch.tensor([1.0, 9.0, 4.0, 1.0])), torch.eye(4), share=0.25, leading=True).abs()[:, 0]
        tensor([0., 1., 0., 0.])
    """
    factor = damped_cholesky(retain, damping=FLOOR)
    half = torch.linalg.solve_triangular(factor, forget, upper=False)
    ratio = torch.linalg.solve_triangular(factor, half.T, upper=False)
    vectors = torch.linalg.solve_triangular(factor.T, torch.linalg.eigh(ratio).eigenvectors, upper=True)
    count = max(1, round(share * len(vectors)))
    return torch.linalg.qr(vectors[:, -count:] if leading else vectors[:, :count]).Q
