"""Probability: descend the mean probability of the answer tokens, whose gradient fades once they are forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from torch_simu._checks import check_number
from torch_simu.unlearning.objectives.answers import answer_log_probs, mean_answer_nll
from torch_simu.unlearning.objectives.objective import RETAIN_WEIGHT, Batch, Term


@dataclass(frozen=True, slots=True)
class Probability:
    r"""Descend the probability of forget answers and the retain loss: $\overline{p(f)} + \gamma\,\mathrm{NLL}(r)$.

    $\overline{p(f)}$ is the mean probability of the scored tokens, each after the true ones before it. It is bounded:
    a token of probability $p$ pulls with $p$ times the force that the negative log-likelihood has, so a forgotten
    one stops pulling. Minus the log-likelihood grows without end instead, and drowns the retain loss.

    Args:
        retain_weight: Weight $\gamma$ of the retain loss.

    Raises:
        ValueError: If the weight is negative.

    Examples:
        >>> Probability(retain_weight=2.0)
        Probability(retain_weight=2.0)
    """

    retain_weight: float = RETAIN_WEIGHT

    def __post_init__(self) -> None:
        check_number("retain_weight", self.retain_weight)

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the mean probability of the forget batch and the weighted loss of the retain batch."""
        log_probs, scored = answer_log_probs(model, forget)
        yield Term("forget", 1.0, log_probs[scored].exp().mean(), "forget tokens")
        yield Term("retain", self.retain_weight, mean_answer_nll(model, retain), "retain tokens")
