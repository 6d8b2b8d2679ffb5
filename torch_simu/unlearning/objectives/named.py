"""The objectives by name, for configurations and the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from transformers import PreTrainedModel

from torch_simu._checks import check_choice, problem
from torch_simu.unlearning.objectives.divergence import EUL, ICU, KeepsPredictions
from torch_simu.unlearning.objectives.grad_diff import GradAscent, GradDiff
from torch_simu.unlearning.objectives.hidden import RMU
from torch_simu.unlearning.objectives.objective import RETAIN_WEIGHT, Objective
from torch_simu.unlearning.objectives.preference import DPO, NPO, SimNPO
from torch_simu.unlearning.objectives.probability import Probability
from torch_simu.unlearning.objectives.refusals import IDK, JensUn, Refusals
from torch_simu.unlearning.objectives.start import StartModel
from torch_simu.unlearning.objectives.token_level import CEU, UNDIAL, WGA, SatImp


class _Given:
    """What an objective may be made of."""

    def __init__(self, weight: float, model: PreTrainedModel | None, refusals: Refusals | None) -> None:
        self.weight = weight
        self._model, self._refusals = model, refusals

    @cached_property
    def start(self) -> StartModel:
        if self._model is None:
            advice = "The objective compares with it."
            raise ValueError(problem("model is None", "the model before the first step", advice))
        return StartModel(self._model)

    @property
    def refusals(self) -> Refusals:
        if self._refusals is None:
            advice = "torch_simu.unlearning.data.refusals.encode_refusals(tokenizer) makes some."
            raise ValueError(problem("refusals is None", "refusing answers as token ids", advice))
        return self._refusals


_NAMED: Mapping[str, Callable[[_Given], Objective]] = MappingProxyType(
    {
        "grad_diff": lambda given: GradDiff(given.weight),
        "grad_ascent": lambda given: GradAscent(),
        "probability": lambda given: Probability(given.weight),
        "npo": lambda given: NPO(given.start, given.weight),
        "simnpo": lambda given: SimNPO(given.weight),
        "wga": lambda given: WGA(given.weight),
        "satimp": lambda given: SatImp(given.weight),
        "ceu": lambda given: CEU(given.weight),
        "undial": lambda given: UNDIAL(given.start, given.weight),
        "jensun": lambda given: JensUn(given.start, given.refusals, given.weight),
        "idk": lambda given: IDK(given.refusals, given.weight),
        "dpo": lambda given: DPO(given.start, given.refusals, given.weight),
        "rmu": lambda given: RMU(given.start, given.weight),
        "eul": lambda given: EUL(given.start, given.weight),
        "icu": lambda given: ICU(given.start, given.weight),
    }
)
"""Name -> objective."""

OBJECTIVES = tuple(_NAMED)
"""The names that `make_objective` knows."""

REFUSING = ("jensun", "idk", "dpo")
"""Those of them that need refusals."""

RETAIN_TERMS = ("nll", "kl")
"""What the retain term may be: the objective's own, mostly a likelihood, or the divergence from the start model."""


def make_objective(
    name: str,
    *,
    retain_weight: float = RETAIN_WEIGHT,
    retain_term: Literal["nll", "kl"] = "nll",
    model: PreTrainedModel | None = None,
    refusals: Refusals | None = None,
) -> Objective:
    """Make an objective by name.

    Args:
        name: One of `OBJECTIVES`.
        retain_weight: Weight of the retain loss.
        retain_term: "nll" for the objective's own, or "kl" for the divergence from the start model on the retain rows.
        model: The model before the first step, with `requires_grad` where it trains, for those that compare with it.
        refusals: Refusing answers as token ids, for those in `REFUSING`.

    Raises:
        ValueError: If a name is unknown, or the model or the refusals are missing.

    Examples:
        >>> make_objective("grad_diff", retain_weight=2.0)
        GradDiff(retain_weight=2.0)
    """
    check_choice("objective", name, OBJECTIVES)
    check_choice("retain_term", retain_term, RETAIN_TERMS)
    given = _Given(retain_weight, model, refusals)
    made = _NAMED[name](given)
    return made if retain_term == "nll" else KeepsPredictions(made, given.start, retain_weight)
