"""The objectives by name, for configurations and the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from transformers import PreTrainedModel

from torch_simu._checks import check_choice, problem
from torch_simu.unlearning.objectives.divergence import KeepsPredictions
from torch_simu.unlearning.objectives.grad_diff import GradAscent, GradDiff
from torch_simu.unlearning.objectives.objective import RETAIN_WEIGHT, Objective
from torch_simu.unlearning.objectives.preference import NPO, SimNPO
from torch_simu.unlearning.objectives.probability import Probability
from torch_simu.unlearning.objectives.start import StartModel

_Make = Callable[[PreTrainedModel | None, float], Objective]

_NAMED: Mapping[str, _Make] = MappingProxyType(
    {
        "grad_diff": lambda model, retain_weight: GradDiff(retain_weight),
        "grad_ascent": lambda model, retain_weight: GradAscent(),
        "probability": lambda model, retain_weight: Probability(retain_weight),
        "npo": lambda model, retain_weight: NPO(_start(model), retain_weight),
        "simnpo": lambda model, retain_weight: SimNPO(retain_weight),
    }
)
"""Name -> objective, of the model as it is before the first step and the weight of the retain loss."""

OBJECTIVES = tuple(_NAMED)
"""The names that `make_objective` knows."""

RETAIN_TERMS = ("nll", "kl")
"""What the retain term may be: the negative log-likelihood, or the divergence from the start model."""


def make_objective(
    name: str,
    *,
    retain_weight: float = RETAIN_WEIGHT,
    retain_term: Literal["nll", "kl"] = "nll",
    model: PreTrainedModel | None = None,
) -> Objective:
    """Make an objective by name.

    Args:
        name: One of `OBJECTIVES`.
        retain_weight: Weight of the retain loss.
        retain_term: "nll", or "kl" for the divergence from the start model on the retain rows.
        model: The model before the first step, with `requires_grad` where it trains, for those that compare with it.

    Raises:
        ValueError: If a name is unknown, or the model is missing; the message lists the known ones.

    Examples:
        >>> make_objective("grad_diff", retain_weight=2.0)
        GradDiff(retain_weight=2.0)
    """
    check_choice("objective", name, OBJECTIVES)
    check_choice("retain_term", retain_term, RETAIN_TERMS)
    made = _NAMED[name](model, retain_weight)
    return made if retain_term == "nll" else KeepsPredictions(made, _start(model), retain_weight)


def _start(model: PreTrainedModel | None) -> StartModel:
    if model is None:
        raise ValueError(problem("model is None", "the model before the first step", "The objective compares with it."))
    return StartModel(model)
