"""Hiding: whether a model that forgot has lost what supported the answers, or gained what suppresses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_simu._checks import problem


@dataclass(frozen=True, slots=True)
class InfluenceChange:
    """How the influence of neurons on the forget answers changed, over the positive influence before.

    Args:
        lost: What positive influence has lost, in [0, 1]: the share that was erased.
        suppressing: What negative influence has gained, at least 0: what hides the answers.

    Examples:
        >>> InfluenceChange(lost=0.6, suppressing=0.2).hiding
        0.25
    """

    lost: float
    suppressing: float

    @property
    def hiding(self) -> float:
        """The share of the change that suppresses, in [0, 1]; 0 where nothing has changed."""
        total = self.lost + self.suppressing
        return self.suppressing / total if total else 0.0


def influence_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> InfluenceChange:
    r"""Return how the positive and the negative influence of neurons on the forget answers have changed.

    With $A_k$ the attribution of neuron $k$ before, $B_k$ after, $x^+ = \max(x, 0)$ and $x^- = \max(-x, 0)$, what is
    lost is $D^+ = \sum_k (A_k^+ - B_k^+)^+$ and what suppresses $D^- = \sum_k (B_k^- - A_k^-)^+$, each over
    $\sum_k A_k^+$. SSIUU (Yang et al. 2025, arXiv 2509.22263) finds $D^- \gg D^+$ where a method hides what relearning
    then brings back. There $A$ is activation times gradient of the answer's probability, of many modules; here it is
    what `attribute_neurons` returns, best with `objective="prob"`, and the two are put over the influence before.

    Args:
        before: Layer -> scores of its neurons on the forget rows, of the model before. Shape: `(num_neurons,)`.
        after: The same of the model that forgot, on the same rows.

    Raises:
        ValueError: If the layers or their sizes differ, or no neuron had a positive influence before.

    Examples:
        >>> before = {"mlp": torch.tensor([3.0, 1.0, -1.0, 0.5])}
        >>> after = {"mlp": torch.tensor([1.0, -1.0, -2.0, 1.0])}
        >>> change = influence_change(before, after)
        >>> change.lost * 4.5, change.suppressing * 4.5
        (3.0, 2.0)
    """
    sizes, theirs = ({name: tuple(each.shape) for name, each in scores.items()} for scores in (before, after))
    if sizes != theirs:
        raise ValueError(problem(f"The scores have layers {theirs}", f"{sizes}, as those before", "Attribute alike."))
    old = torch.cat([before[name].flatten().double() for name in sizes]) if sizes else torch.zeros(0)
    new = torch.cat([after[name].flatten().double() for name in sizes]) if sizes else torch.zeros(0)
    total = old.clamp(min=0).sum().item()
    if not total > 0:
        raise ValueError(problem("No neuron has a positive score before", "at least one: the answers were known"))
    lost = (old.clamp(min=0) - new.clamp(min=0)).clamp(min=0).sum().item()
    suppressing = ((-new).clamp(min=0) - (-old).clamp(min=0)).clamp(min=0).sum().item()
    return InfluenceChange(lost / total, suppressing / total)
