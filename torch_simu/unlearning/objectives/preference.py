"""NPO, SimNPO and DPO: bounded objectives that treat forget answers as the losing side of a preference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.nn import functional
from transformers import PreTrainedModel

from torch_simu._checks import check_number
from torch_simu.unlearning.objectives.answers import answer_log_probs, mean_answer_nll
from torch_simu.unlearning.objectives.objective import RETAIN_WEIGHT, Batch, Term
from torch_simu.unlearning.objectives.refusals import Refusals, checked_refusals, refused
from torch_simu.unlearning.objectives.start import StartModel


@dataclass(frozen=True, slots=True)
class NPO:
    r"""Negative preference optimization, with a retain loss (Zhang et al. 2024, arXiv 2404.05868).

    $$-\frac{2}{\beta} \overline{\log \sigma\left(\beta (\mathrm{NLL}(f) - \mathrm{NLL}_0(f))\right)}
      + \gamma\,\mathrm{NLL}(r)$$

    with the negative log-likelihoods summed over the scored tokens of a row, and the mean over the rows.

    Args:
        start: The model before the first step, whose likelihood is $\mathrm{NLL}_0$.
        retain_weight: Weight $\gamma$ of the retain loss.
        beta: Inverse temperature $\beta$: larger stops earlier.

    Raises:
        ValueError: If the weight is negative, or `beta` not positive.
    """

    start: StartModel
    retain_weight: float = RETAIN_WEIGHT
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_number("retain_weight", self.retain_weight)
        check_number("beta", self.beta, low_open=True)

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the preference loss of the forget batch and the weighted loss of the retain batch."""
        with self.start.in_place(model):
            before, _ = answer_log_probs(model, forget)
        now, _ = answer_log_probs(model, forget)
        margin = self.beta * (before.sum(dim=1) - now.sum(dim=1))
        yield Term("forget", 2.0 / self.beta, -functional.logsigmoid(margin).mean(), "pairs")
        yield Term("retain", self.retain_weight, mean_answer_nll(model, retain), "retain tokens")


@dataclass(frozen=True, slots=True)
class SimNPO:
    r"""NPO without a start model, by the mean over a row's tokens (Fan et al. 2024, arXiv 2410.07163).

    $$-\frac{2}{\beta} \overline{\log \sigma\left(\beta (\mathrm{NLL}(f) / |y| - \delta)\right)}
      + \gamma\,\mathrm{NLL}(r)$$

    Args:
        retain_weight: Weight $\gamma$ of the retain loss.
        beta: Inverse temperature $\beta$.
        margin: $\delta$, in nats per token: above it a row counts as forgotten.

    Raises:
        ValueError: If a weight is negative, or `beta` not positive.

    Examples:
        >>> SimNPO()
        SimNPO(retain_weight=2.0, beta=4.5, margin=0.0)
    """

    retain_weight: float = RETAIN_WEIGHT
    beta: float = 4.5
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_number("retain_weight", self.retain_weight)
        check_number("beta", self.beta, low_open=True)
        check_number("margin", self.margin)

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the preference loss of the forget batch and the weighted loss of the retain batch."""
        log_probs, scored = answer_log_probs(model, forget)
        nll = -log_probs.sum(dim=1) / scored.sum(dim=1).clamp(min=1)
        loss = -functional.logsigmoid(self.beta * (nll - self.margin)).mean()
        yield Term("forget", 2.0 / self.beta, loss, "pairs")
        yield Term("retain", self.retain_weight, mean_answer_nll(model, retain), "retain tokens")


@dataclass(frozen=True, slots=True)
class DPO:
    r"""Direct preference of a refusal to each forget answer (Rafailov et al. 2023, arXiv 2305.18290; 2401.06121).

    $$-\frac{2}{\beta} \overline{\log \sigma\left(\beta (\mathrm{NLL}(f) - \mathrm{NLL}_0(f)
      - \mathrm{NLL}(\text{refusal}) + \mathrm{NLL}_0(\text{refusal}))\right)} + \gamma\,\mathrm{NLL}(r)$$

    with the negative log-likelihoods summed over the scored tokens of a row, and the mean over the rows. Which refusal
    a row gets depends on its question alone.

    Args:
        start: The model before the first step, whose likelihood is $\mathrm{NLL}_0$.
        refusals: Refusing answers.
        retain_weight: Weight $\gamma$ of the retain loss.
        beta: Inverse temperature $\beta$: larger stops earlier.

    Raises:
        ValueError: If there is no refusal, one has no token, the weight is negative, or `beta` not positive.
    """

    start: StartModel
    refusals: Refusals
    retain_weight: float = RETAIN_WEIGHT
    beta: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "refusals", checked_refusals(self.refusals))
        check_number("retain_weight", self.retain_weight)
        check_number("beta", self.beta, low_open=True)

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the preference loss of the forget batch and the weighted loss of the retain batch."""
        refusing = refused(forget, self.refusals)
        with self.start.in_place(model):
            lost, won = (answer_log_probs(model, batch)[0].sum(dim=1) for batch in (forget, refusing))
        lost = lost - answer_log_probs(model, forget)[0].sum(dim=1)
        won = answer_log_probs(model, refusing)[0].sum(dim=1) - won
        yield Term("forget", 2.0 / self.beta, -functional.logsigmoid(self.beta * (lost + won)).mean(), "pairs")
        yield Term("retain", self.retain_weight, mean_answer_nll(model, retain), "retain tokens")
