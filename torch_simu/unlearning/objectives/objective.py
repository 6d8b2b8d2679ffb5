"""Objective: what an unlearning step descends, as weighted terms on a forget batch and a retain batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]
"""`input_ids`, `labels` (-100 = not scored) and `attention_mask`, each of shape `(batch, length)`."""

RETAIN_WEIGHT = 2.0
"""The weight of the retain loss, unless another is given."""


class Term(NamedTuple):
    """One summand of an objective: `weight * loss`, under a name for the log.

    `mean_over` says what `loss` is a mean over, so that a step may be split into micro-batches: the scored tokens of
    one of the batches, or the rows, each forget row paired with a retain row.
    """

    name: str
    weight: float
    loss: Tensor
    mean_over: Literal["forget tokens", "retain tokens", "pairs"] = "pairs"


class Objective(Protocol):
    """What an unlearning step descends: the sum of `weight * loss` over its terms.

    The term of the forget set comes first. Terms come one at a time, so that each can be differentiated, and its graph
    freed, before the next is made.
    """

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the terms on a forget batch and a retain batch, with gradients."""
        ...
