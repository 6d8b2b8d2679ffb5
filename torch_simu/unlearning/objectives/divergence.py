"""KeepsPredictions, EUL and ICU, and divergences of a model from what it was before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from torch_simu._checks import check_number
from torch_simu.unlearning.objectives.answers import (
    answer_logits,
    answer_predictions,
    label_log_probs,
    mean_answer_nll,
)
from torch_simu.unlearning.objectives.objective import RETAIN_WEIGHT, Batch, Objective, Term
from torch_simu.unlearning.objectives.start import StartModel


@dataclass(frozen=True, slots=True)
class KeepsPredictions:
    r"""An objective's forget term, and $\gamma\,\mathrm{KL}(p_0 \Vert p)$ on the scored tokens of the retain batch.

    Args:
        objective: Where the forget term comes from.
        start: The model before the first step, whose predictions are $p_0$.
        retain_weight: Weight $\gamma$ of the divergence.

    Raises:
        ValueError: If the weight is negative.
    """

    objective: Objective
    start: StartModel
    retain_weight: float = RETAIN_WEIGHT

    def __post_init__(self) -> None:
        check_number("retain_weight", self.retain_weight)

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the first term of the objective, and the divergence on the retain batch."""
        # The first alone: its own retain term would cost a pass before it could be left out.
        yield from islice(self.objective.terms(model, forget, retain), 1)
        loss = divergence_from_start(model, self.start, retain)
        yield Term("retain", self.retain_weight, loss, "retain tokens")


@dataclass(frozen=True, slots=True)
class EUL:
    r"""Keep near a teacher on the retain set and away from it on the forget set (Chen and Yang 2023, arXiv 2310.20150).

    $$-\left(\mathrm{KL}(p_0 \Vert p)_f + \mu\,\mathrm{NLL}(f)\right)
      + \gamma\left(\alpha\,\mathrm{KL}(p_0 \Vert p)_r + \mathrm{NLL}(r)\right)$$

    The teacher is the start model, each divergence a mean over scored tokens. The source trains layers put in beside a
    frozen model by it, and masks spans of the forget texts for the last term; here it is the loss of the answers. Its
    weights are not known to us. Neither forget term is bounded.

    Args:
        start: The model before the first step, whose predictions are $p_0$.
        retain_weight: Weight $\gamma$ of both retain terms.
        teacher_weight: Weight $\alpha$ of the divergence on the retain batch.
        ascent_weight: Weight $\mu$ of the forget loss; without it there is no gradient at the start.

    Raises:
        ValueError: If a weight is negative.
    """

    start: StartModel
    retain_weight: float = RETAIN_WEIGHT
    teacher_weight: float = 1.0
    ascent_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("retain_weight", "teacher_weight", "ascent_weight"):
            check_number(name, getattr(self, name))

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the negated divergence and loss of the forget batch, and the weighted ones of the retain batch."""
        for name, weight, batch, divergence, nll in (
            ("forget", -1.0, forget, 1.0, self.ascent_weight),
            ("retain", self.retain_weight, retain, self.teacher_weight, 1.0),
        ):
            loss = divergence * divergence_from_start(model, self.start, batch) + nll * mean_answer_nll(model, batch)
            yield Term(name, weight, loss, "forget tokens" if name == "forget" else "retain tokens")


@dataclass(frozen=True, slots=True)
class ICU:
    r"""Forget each row until it is forgotten, and learn what is analogous (Tang et al. 2024, arXiv 2407.20271).

    $$-\overline{\mathrm{nll}\,[\text{its row is still known}]}
      + \gamma\left(\lambda\,\mathrm{NLL}(r) + \kappa\,\mathrm{KL}(p_0 \Vert p)_r\right)$$

    The retain rows should be texts like those to forget, as the source finds them by their embeddings. A row is known
    while more than the share `stop` of its scored tokens is predicted, each after the true ones before it; after that
    it is left out of the mean's sum. The source judges by BLEU and BERTScore of a generated text, between epochs.

    Args:
        start: The model before the first step, whose predictions are $p_0$.
        retain_weight: Weight $\gamma$ of both retain terms.
        learn_weight: $\lambda$.
        keep_weight: $\kappa$.
        stop: Share of a row's tokens; the source ends where the mean share of its set is at most so large.

    Raises:
        ValueError: If a weight is negative, or `stop` not in [0, 1].
    """

    start: StartModel
    retain_weight: float = RETAIN_WEIGHT
    learn_weight: float = 0.5
    keep_weight: float = 1.0
    stop: float = 0.5994

    def __post_init__(self) -> None:
        for name in ("retain_weight", "learn_weight", "keep_weight"):
            check_number(name, getattr(self, name))
        check_number("stop", self.stop, high=1.0)

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the negated loss of the forget rows that are known, and the weighted losses of the retain batch."""
        logits = answer_logits(model, forget)
        log_probs, scored = label_log_probs(logits, forget["labels"])
        right = scored & (logits[:, :-1].argmax(dim=-1) == forget["labels"][:, 1:].to(logits.device))
        known = right.sum(dim=1) > self.stop * scored.sum(dim=1)
        yield Term("forget", -1.0, -(log_probs.sum(dim=1) * known).sum() / scored.sum(), "forget tokens")
        divergence = divergence_from_start(model, self.start, retain)
        loss = self.learn_weight * mean_answer_nll(model, retain) + self.keep_weight * divergence
        yield Term("retain", self.retain_weight, loss, "retain tokens")


def divergence_from_start(model: PreTrainedModel, start: StartModel, batch: Batch) -> Tensor:
    r"""Return the mean of $\mathrm{KL}(p_0 \Vert p)$ over the scored tokens of a batch, in nats.

    Args:
        model: A causal language model.
        start: The same model before the first step, which predicts $p_0$.
        batch: As in `mean_answer_nll`.

    Raises:
        ValueError: If no position is scored.
    """
    before, now = _both(model, start, batch)
    return functional.kl_div(now, before, reduction="batchmean", log_target=True)


def shannon_from_start(model: PreTrainedModel, start: StartModel, batch: Batch) -> Tensor:
    """Return the mean Jensen-Shannon divergence from the start model's predictions, in nats: at most the log of two.

    Args:
        model: A causal language model.
        start: The same model before the first step.
        batch: As in `mean_answer_nll`.

    Raises:
        ValueError: If no position is scored.
    """
    before, now = _both(model, start, batch)
    middle = torch.logaddexp(before, now) - math.log(2)
    sides = [functional.kl_div(middle, side, reduction="batchmean", log_target=True) for side in (before, now)]
    return torch.stack(sides).mean()


def _both(model: PreTrainedModel, start: StartModel, batch: Batch) -> tuple[Tensor, Tensor]:
    with start.in_place(model):
        before, _ = answer_predictions(model, batch)
    return before, answer_predictions(model, batch)[0]
