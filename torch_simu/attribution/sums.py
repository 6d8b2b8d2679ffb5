"""LayerSum: what one layer contributes over some samples, and how gradients become it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_simu.attribution.path import Path
from torch_simu.attribution.rows import Row

Method = Callable[[nn.Module, Sequence[Row], Mapping[str, nn.Module], Path], Iterator[tuple[str, "LayerSum"]]]
"""A way to attribute: from model, rows, layers and path to one sum per layer, in the order of the layers."""


class NotApplicableError(ValueError):
    """The method would give a wrong result on this model or these rows."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerSum:
    """Sums over samples of one layer.

    Attributes:
        scores: Attribution of each neuron, in units of the objective. Shape: `(num_neurons,)`, float64 on the CPU.
        error: Sum of the scores minus the change of the objective along the path.
    """

    scores: Tensor
    error: float


def scaled(activation: Tensor, alphas: Sequence[float]) -> Tensor:
    """Return `alpha * activation` for each alpha as a new leaf that requires a gradient, rounded once.

    Shape: `(num_alphas,)` before those of `activation`.
    """
    wide = activation.detach().to(torch.promote_types(activation.dtype, torch.float32))
    points = torch.tensor(alphas, dtype=wide.dtype, device=wide.device)
    return (points.reshape(-1, *[1] * wide.dim()) * wide).to(activation.dtype).requires_grad_()


def attributed(gradient: Tensor, activation: Tensor) -> Tensor:
    """Return the sum over path points and positions of activation times gradient.

    Args:
        gradient: Of the objective. Shape: `(num_alphas, ..., num_neurons)`.
        activation: The clean one. Shape: `(..., num_neurons)`.

    Returns:
        Shape: `(num_neurons,)`, float64 on the CPU.
    """
    wide = torch.promote_types(activation.dtype, torch.float32)
    product = gradient.to(wide).sum(0) * activation.to(wide)
    if product.device.type == "mps":
        # That device has no float64.
        product = product.cpu()
    return product.double().flatten(0, -2).sum(0).cpu()
