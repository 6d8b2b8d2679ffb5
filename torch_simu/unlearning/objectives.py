"""Objectives: what an unlearning step descends, as weighted terms on a forget batch and a retain batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from torch_simu._checks import check_choice, check_number
from torch_simu.curvature import scored_logits

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

    The terms come one at a time, so that each can be differentiated, and its graph freed, before the next is made.
    """

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the terms on a forget batch and a retain batch, with gradients."""
        ...


def mean_answer_nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the mean negative log-likelihood of the scored tokens, in nats per token.

    Args:
        model: A causal language model.
        batch: Tensors on the model's device, as `torch_simu.unlearning.data.examples.collate` makes them.

    Raises:
        ValueError: If no position is scored.
    """
    logits = answer_logits(model, batch)
    logits, labels = scored_logits(logits, batch["labels"])
    return functional.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels)


def answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the logits of a batch. Shape: `(batch, length, vocabulary)`."""
    # Without a cache, which would hold every layer's keys and values through the backward pass.
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits: Tensor = output.logits
    return logits


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


_NAMED: Mapping[str, type[GradAscent] | type[GradDiff]] = MappingProxyType(
    {"grad_diff": GradDiff, "grad_ascent": GradAscent}
)
OBJECTIVES = tuple(_NAMED)
"""The names that `make_objective` knows."""


def make_objective(name: str, *, retain_weight: float = RETAIN_WEIGHT) -> Objective:
    """Make an objective by name; `retain_weight` goes to those that have a retain term.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.

    Examples:
        >>> make_objective("grad_diff", retain_weight=2.0)
        GradDiff(retain_weight=2.0)
    """
    kind = _NAMED[check_choice("objective", name, OBJECTIVES)]
    return GradDiff(retain_weight) if kind is GradDiff else kind()
