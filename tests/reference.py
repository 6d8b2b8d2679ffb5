"""Naive oracles of the core: written to be obviously right, never to be quick."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.strategies import Options


class DenseMaskedSophia:
    """Dense Sophia whose momentum, curvature and weight are masked after every update, as the paper writes it."""

    def __init__(self, weight: Tensor, mask: Tensor, options: Options, eps: float = 1e-12) -> None:
        self.weight, self.mask, self.options, self.eps = weight.clone(), mask, options, eps
        self.m, self.h = torch.zeros_like(weight), torch.zeros_like(weight)

    def step(self, grad: Tensor) -> None:
        """One update of momentum and weight."""
        o = self.options
        self.m = torch.where(self.mask, o.beta1 * self.m + (1 - o.beta1) * grad, 0.0)
        ratio = torch.clamp(self.m / torch.clamp(o.rho * self.h, min=self.eps), -o.clip, o.clip)
        moved = self.weight * (1 - o.lr * o.weight_decay) - o.lr * ratio
        self.weight = torch.where(self.mask, moved, self.weight)

    def refresh(self, grad: Tensor, num_tokens: int) -> None:
        """One update of the curvature."""
        o = self.options
        self.h = torch.where(self.mask, o.beta2 * self.h + (1 - o.beta2) * num_tokens * grad**2, 0.0)


def sampled_diagonal(inputs: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    """The exact Gauss-Newton diagonal of mean cross-entropy for `logits = inputs @ weight.T`, token by token.

    Args:
        inputs: Shape `(tokens, features)`.
        logits: Shape `(tokens, classes)`.
        weight: Shape `(classes, features)`, for its shape only.
    """
    total = torch.zeros_like(weight)
    for x, p in zip(inputs, logits.softmax(-1), strict=True):
        total += (p * (1 - p))[:, None] * x[None, :] ** 2
    return total / len(inputs)
