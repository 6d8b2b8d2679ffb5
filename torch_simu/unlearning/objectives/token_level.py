"""WGA, SatImp, CEU and UNDIAL: objectives that see each scored token of the forget set by its predictions alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from torch_simu._checks import check_number
from torch_simu.unlearning.objectives.answers import answer_log_probs, answer_predictions, mean_answer_nll
from torch_simu.unlearning.objectives.objective import RETAIN_WEIGHT, Batch, Term
from torch_simu.unlearning.objectives.start import StartModel


@dataclass(frozen=True, slots=True)
class WGA:
    r"""Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301).

    $$-\overline{p^\beta\,\mathrm{nll}} + \gamma\,\mathrm{NLL}(r)$$

    Each scored token of the forget batch is ascended with the weight $p^\beta$, its own probability, through which no
    gradient flows: what is forgotten stops pulling. With $\beta = 1$ the gradient is that of `Probability`.

    Args:
        retain_weight: Weight $\gamma$ of the retain loss.
        beta: Exponent $\beta$; with 0 it is `GradDiff`.

    Raises:
        ValueError: If a number is negative.

    Examples:
        >>> WGA()
        WGA(retain_weight=2.0, beta=1.0)
    """

    retain_weight: float = RETAIN_WEIGHT
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_number("retain_weight", self.retain_weight)
        check_number("beta", self.beta)

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the negated weighted loss of the forget batch and the weighted loss of the retain batch."""
        yield Term("forget", -1.0, _reweighted_nll(model, forget, self.beta, 0.0), "forget tokens")
        yield Term("retain", self.retain_weight, mean_answer_nll(model, retain), "retain tokens")


@dataclass(frozen=True, slots=True)
class SatImp:
    r"""Ascend by saturation and importance (Yang et al. 2025, arXiv 2505.11953).

    $$-\overline{p^{\beta_1} (1 - p)^{\beta_2}\,\mathrm{nll}} + \gamma\,\mathrm{NLL}(r)$$

    $p$ is the probability of a scored token of the forget batch; no gradient flows through the weights. The first
    factor passes over what is forgotten, the second over what is certain and so carries little.

    Args:
        retain_weight: Weight $\gamma$ of the retain loss; the source takes 0.1.
        saturation: Exponent $\beta_1$.
        importance: Exponent $\beta_2$.

    Raises:
        ValueError: If a number is negative.

    Examples:
        >>> SatImp()
        SatImp(retain_weight=2.0, saturation=5.0, importance=1.0)
    """

    retain_weight: float = RETAIN_WEIGHT
    saturation: float = 5.0
    importance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("retain_weight", "saturation", "importance"):
            check_number(name, getattr(self, name))

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the negated weighted loss of the forget batch and the weighted loss of the retain batch."""
        loss = _reweighted_nll(model, forget, self.saturation, self.importance)
        yield Term("forget", -1.0, loss, "forget tokens")
        yield Term("retain", self.retain_weight, mean_answer_nll(model, retain), "retain tokens")


@dataclass(frozen=True, slots=True)
class CEU:
    r"""Cross-entropy unlearning (Yang 2025, arXiv 2503.01224).

    $$-\overline{\textstyle\sum_v q_v \log p_v} + \gamma\,\mathrm{NLL}(r), \qquad
      q = \mathrm{softmax}(z \text{ with } z_y = -\infty)$$

    $z$ are the model's own logits where the scored token $y$ of the forget batch is predicted; no gradient flows
    through the target $q$, which is what is left without $y$. So $y$ is pushed down with the force of its own
    probability, and the other tokens keep their proportions. The source leaves the first token of an answer out on
    TOFU; here every scored token counts.

    Args:
        retain_weight: Weight $\gamma$ of the retain loss; the source has none.

    Raises:
        ValueError: If the weight is negative.

    Examples:
        >>> CEU()
        CEU(retain_weight=2.0)
    """

    retain_weight: float = RETAIN_WEIGHT

    def __post_init__(self) -> None:
        check_number("retain_weight", self.retain_weight)

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the cross-entropy of the forget batch to its targets and the weighted loss of the retain batch."""
        now, labels = answer_predictions(model, forget)
        targets = now.detach().scatter(1, labels[:, None], -torch.inf).softmax(dim=-1)
        yield Term("forget", 1.0, _cross_entropy(now, targets), "forget tokens")
        yield Term("retain", self.retain_weight, mean_answer_nll(model, retain), "retain tokens")


@dataclass(frozen=True, slots=True)
class UNDIAL:
    r"""Self-distillation from adjusted logits (Dong et al. 2024, arXiv 2402.10052).

    $$-\overline{\textstyle\sum_v q_v \log p_v} + \gamma\,\mathrm{NLL}(r), \qquad
      q = \mathrm{softmax}(z_0 - \beta\,e_y)$$

    $z_0$ are the start model's logits where the scored token $y$ of the forget batch is predicted. The target stays
    where it is, so nothing is pushed beyond it.

    Args:
        start: The model before the first step, whose logits are $z_0$.
        retain_weight: Weight $\gamma$ of the retain loss; the source has none.
        strength: $\beta$, in nats: by how much the logit of $y$ is lowered; the source tries 3, 10 and 30.

    Raises:
        ValueError: If a number is negative.
    """

    start: StartModel
    retain_weight: float = RETAIN_WEIGHT
    strength: float = 10.0

    def __post_init__(self) -> None:
        check_number("retain_weight", self.retain_weight)
        check_number("strength", self.strength)

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the cross-entropy of the forget batch to its targets and the weighted loss of the retain batch."""
        with self.start.in_place(model):
            before, labels = answer_predictions(model, forget)
            lowered = before.gather(1, labels[:, None]) - self.strength
            targets = before.scatter(1, labels[:, None], lowered).softmax(dim=-1)
        now, _ = answer_predictions(model, forget)
        yield Term("forget", 1.0, _cross_entropy(now, targets), "forget tokens")
        yield Term("retain", self.retain_weight, mean_answer_nll(model, retain), "retain tokens")


def _reweighted_nll(model: PreTrainedModel, batch: Batch, saturation: float, importance: float) -> Tensor:
    log_probs, scored = answer_log_probs(model, batch)
    log_probs = log_probs[scored]
    probs = log_probs.detach().exp()
    return -(probs**saturation * (1 - probs) ** importance * log_probs).mean()


def _cross_entropy(now: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of log-probabilities `now` to target probabilities, each token a row."""
    return -(targets * now).sum(dim=-1).mean()
