"""GradAscent and GradDiff: ascend the loss of the forget set, whatever it has become."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from torch_simu._checks import check_number
from torch_simu.unlearning.objectives.answers import mean_answer_nll
from torch_simu.unlearning.objectives.objective import RETAIN_WEIGHT, Batch, Term


@dataclass(frozen=True, slots=True)
class GradAscent:
    r"""Ascend the forget set's loss, and nothing else: $-\mathrm{NLL}(f)$ (Jang et al. 2023)."""

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the negated loss of the forget batch."""
        yield Term("forget", -1.0, mean_answer_nll(model, forget), "forget tokens")


@dataclass(frozen=True, slots=True)
class GradDiff:
    r"""Ascend on the forget set, descend on the retain set: $-\mathrm{NLL}(f) + \gamma\,\mathrm{NLL}(r)$.

    Args:
        retain_weight: Weight $\gamma$ of the retain loss (Liu et al. 2022; Maini et al. 2024).

    Raises:
        ValueError: If the weight is negative.

    Examples:
        >>> GradDiff(retain_weight=2.0)
        GradDiff(retain_weight=2.0)
    """

    retain_weight: float = RETAIN_WEIGHT

    def __post_init__(self) -> None:
        check_number("retain_weight", self.retain_weight)

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the negated loss of the forget batch and the weighted loss of the retain batch."""
        yield Term("forget", -1.0, mean_answer_nll(model, forget), "forget tokens")
        yield Term("retain", self.retain_weight, mean_answer_nll(model, retain), "retain tokens")
