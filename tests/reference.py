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


def trimmed_mean(values: Tensor) -> Tensor:
    """The mean of all but the largest fiftieth."""
    found = sorted(values.tolist())
    return values.new_tensor(sum(found[: len(found) - int(0.02 * len(found))]) / (len(found) - int(0.02 * len(found))))


class DenseWhitened:
    """The whitened step with inverses of dense covariances and one layer's weight, as the formulas are written.

    Args:
        weight: Shape `(d_model, num_neurons)`.
        neurons: The selected ones.
        outputs: Whether the outputs are whitened, too.
        options: Of the step; `clip`, `rho` and `interval` play no part.
        damping: Share of the mean of the diagonal without its largest fiftieth.
    """

    def __init__(self, weight: Tensor, neurons: list[int], options: Options, *, outputs: bool, damping: float) -> None:
        self.weight, self.neurons, self.options, self.damping = weight.clone(), neurons, options, damping
        self.m = torch.zeros_like(weight[:, neurons])
        self.covariances: list[Tensor | None] = [None, None] if outputs else [None]
        self.norm = torch.zeros(())

    def refresh(self, activation: Tensor, gradient: Tensor) -> None:
        """Average the covariances of positions in; the gradient is that of the layer's outputs.

        Args:
            activation: Shape `(num_positions, num_neurons)`.
            gradient: Shape `(num_positions, d_model)`.
        """
        reached = [position for position in range(len(gradient)) if gradient[position].abs().sum() > 0]
        for side, rows in enumerate((activation[:, self.neurons], gradient)[: len(self.covariances)]):
            found = sum(torch.outer(rows[position], rows[position]) for position in reached) / len(reached)
            if side == 1:
                found = found / found.diagonal().mean()
            before, beta2 = self.covariances[side], self.options.beta2
            self.covariances[side] = found if before is None else beta2 * before + (1 - beta2) * found
        self.norm = self.weight[:, self.neurons].norm()

    def whitened(self, grad: Tensor) -> Tensor:
        """The selected columns of a gradient, times the inverses of the damped covariances."""
        inverses = [
            torch.linalg.inv(
                each + self.damping * trimmed_mean(each.diagonal()) * torch.eye(len(each), dtype=each.dtype)
            )
            for each in self.covariances
        ]
        found = grad[:, self.neurons] @ inverses[0]
        return inverses[1] @ found if len(inverses) > 1 else found

    def step(self, grad: Tensor) -> None:
        """One update of momentum and weight."""
        o, found = self.options, self.whitened(grad)
        self.m = o.beta1 * self.m + (1 - o.beta1) * found / found.norm()
        kept = self.weight[:, self.neurons] * (1 - o.lr * o.weight_decay)
        self.weight[:, self.neurons] = kept - o.lr * self.norm * self.m


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
