"""KeepsPredictions: an objective whose retain term is the divergence from the start model instead of a likelihood."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from torch_simu._checks import check_number
from torch_simu.curvature import IGNORED
from torch_simu.unlearning.objectives.answers import answer_logits
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
        """Yield the forget terms of the objective, and the divergence on the retain batch."""
        for term in self.objective.terms(model, forget, retain):
            if term.name == "retain":
                break
            yield term
        with self.start.in_place(model):
            before = _scored_log_probs(model, retain)
        now = _scored_log_probs(model, retain)
        loss = functional.kl_div(now, before, reduction="batchmean", log_target=True)
        yield Term("retain", self.retain_weight, loss, "retain tokens")


def _scored_log_probs(model: PreTrainedModel, batch: Batch) -> Tensor:
    logits, labels = answer_logits(model, batch)[:, :-1], batch["labels"][:, 1:].to(model.device)
    logits = logits[labels != IGNORED]
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)
