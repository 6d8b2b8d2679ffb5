"""The path that attribution integrates along: its points, and the quantity F that changes on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from torch_simu._checks import check_choice, check_count

Objective = Literal["logprob", "prob", "loss"]
"""What is attributed: log-likelihood of the target, its probability, or its negative log-likelihood."""

Rule = Literal["gauss", "midpoint", "right", "left"]
"""At which points of the path the gradient is taken: those of Gauss and Legendre, or one in each of equal parts."""

OBJECTIVES = ("logprob", "prob", "loss")
RULES = ("gauss", "midpoint", "right", "left")


@dataclass(frozen=True, slots=True)
class Path:
    r"""The straight path from zero activation to the clean one, and what is measured on it.

    Args:
        objective: The quantity $F$.
        rule: Which points stand for the path. "gauss" integrates polynomials up to degree $2m - 1$ exactly,
            "midpoint" those of degree 1.
        steps: Number $m$ of points.
        measured: Whether F is measured at both ends, too, for completeness.

    Raises:
        ValueError: If the objective or the rule is unknown, or `steps` is below 1.
        TypeError: If `steps` is not a whole number.

    Examples:
        >>> Path(rule="midpoint", steps=2).alphas
        [0.25, 0.75]
    """

    objective: Objective = "logprob"
    rule: Rule = "midpoint"
    steps: int = 10
    measured: bool = True

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("rule", self.rule, RULES)
        check_count("steps", self.steps)

    @property
    def alphas(self) -> list[float]:
        r"""The points $\alpha_j$, $j = 1 \dots m$, ascending.

        $(j - 1/2)/m$ (midpoint), $j/m$ (right), $(j - 1)/m$ (left), or the zeros of the Legendre polynomial of degree
        $m$, moved from $[-1, 1]$ to $[0, 1]$ (gauss).
        """
        if self.rule == "gauss":
            return [float(1 + node) / 2 for node in leggauss(self.steps)[0]]
        shift = {"midpoint": 0.5, "right": 0.0, "left": 1.0}[self.rule]
        return [(j - shift) / self.steps for j in range(1, self.steps + 1)]

    @property
    def ends(self) -> list[float]:
        """Where F is measured, the end that is a change first: nothing of the activation, and all of it."""
        return [0.0, 1.0] if self.measured else []

    @property
    def weights(self) -> list[float]:
        """How much each point counts, with a mean of 1."""
        if self.rule == "gauss":
            return [float(weight) * self.steps / 2 for weight in leggauss(self.steps)[1]]
        return [1.0] * self.steps

    def values(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return F of each sample, see `objective_values`."""
        return objective_values(logits, targets, self.objective)


def objective_values(logits: Tensor, targets: Tensor, objective: Objective) -> Tensor:
    """Return F for each target token, in at least 32 bits.

    Args:
        logits: Scores over the vocabulary. Shape: `(..., vocabulary)`.
        targets: Token ids. Shape: any that broadcasts to `(...)`.
        objective: "logprob", "prob" or "loss".

    Returns:
        Log-likelihood in nats, probability, or negative log-likelihood in nats. Shape: `(...)`.

    Raises:
        ValueError: If the objective is unknown.

    Examples:
        >>> objective_values(torch.zeros(1, 4), torch.tensor([2]), "prob")
        tensor([0.2500])
    """
    check_choice("objective", objective, OBJECTIVES)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = targets.to(logits.device).expand(logits.shape[:-1]).unsqueeze(-1)
    logprob = wide.log_softmax(-1).gather(-1, index).squeeze(-1)
    if objective == "prob":
        return logprob.exp()
    return -logprob if objective == "loss" else logprob
