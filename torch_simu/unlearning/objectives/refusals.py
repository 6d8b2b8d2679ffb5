"""IDK and JensUn: learn to refuse where an answer is to be forgotten; and what of a batch becomes of a refusal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from torch_simu._checks import check_number, problem
from torch_simu.curvature import IGNORED
from torch_simu.unlearning.objectives.answers import answer_log_probs, mean_answer_nll
from torch_simu.unlearning.objectives.divergence import shannon_from_start
from torch_simu.unlearning.objectives.objective import RETAIN_WEIGHT, Batch, Term
from torch_simu.unlearning.objectives.start import StartModel

Refusals = Sequence[Sequence[int]]
"""Refusing answers as token ids, each with its end; `encode_refusals` of `torch_simu.unlearning.data` makes some."""


@dataclass(frozen=True, slots=True)
class IDK:
    r"""Learn a refusal in place of each forget answer (Maini et al. 2024, arXiv 2401.06121).

    $$\overline{\mathrm{NLL}(\text{refusal} \mid q) / |\text{refusal}|} + \gamma\,\mathrm{NLL}(r)$$

    with the mean over the tokens of a refusal, then over the forget rows. What stands before a row's first scored token
    is its question $q$; which refusal it gets depends on the question alone, where the source draws one at each pass.

    Args:
        refusals: Refusing answers.
        retain_weight: Weight $\gamma$ of the retain loss.

    Raises:
        ValueError: If there is no refusal, one has no token, or the weight is negative.

    Examples:
        >>> IDK([(5, 6)])
        IDK(refusals=((5, 6),), retain_weight=2.0)
    """

    refusals: Refusals
    retain_weight: float = RETAIN_WEIGHT

    def __post_init__(self) -> None:
        object.__setattr__(self, "refusals", checked_refusals(self.refusals))
        check_number("retain_weight", self.retain_weight)

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the loss of the refusals and the weighted loss of the retain batch."""
        log_probs, scored = answer_log_probs(model, refused(forget, self.refusals))
        yield Term("forget", 1.0, -(log_probs.sum(dim=1) / scored.sum(dim=1)).mean(), "pairs")
        yield Term("retain", self.retain_weight, mean_answer_nll(model, retain), "retain tokens")


@dataclass(frozen=True, slots=True)
class JensUn:
    r"""Bounded divergences from a refusal and from the start model (Singh et al. 2025, arXiv 2509.02820).

    $$\overline{\mathrm{JS}(p, e_{y'})} + \gamma\,\overline{\mathrm{JS}(p, p_0)}_r, \qquad
      \mathrm{JS}(p, q) = \tfrac12 \mathrm{KL}(p \Vert m) + \tfrac12 \mathrm{KL}(q \Vert m)$$

    with $m = (p + q) / 2$, in nats, so each is at most $\log 2$. At the scored tokens of a forget row, each after the
    true ones before it, the target $e_{y'}$ is certain of a token of the row's refusal, which is repeated over the
    length of the answer. Which refusal it is depends on the row's question alone.

    Args:
        start: The model before the first step, whose predictions are $p_0$.
        refusals: Refusing answers; the source has one, "No idea".
        retain_weight: Weight $\gamma$ of the divergence on the retain batch.

    Raises:
        ValueError: If there is no refusal, one has no token, or the weight is negative.
    """

    start: StartModel
    refusals: Refusals
    retain_weight: float = RETAIN_WEIGHT

    def __post_init__(self) -> None:
        object.__setattr__(self, "refusals", checked_refusals(self.refusals))
        check_number("retain_weight", self.retain_weight)

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the divergence of the forget batch from refusals, and of the retain batch from the start model."""
        log_probs, scored = answer_log_probs(model, retargeted(forget, self.refusals))
        yield Term("forget", 1.0, _shannon_from_certain(log_probs[scored]).mean(), "forget tokens")
        yield Term("retain", self.retain_weight, shannon_from_start(model, self.start, retain), "retain tokens")


def checked_refusals(refusals: Refusals) -> tuple[tuple[int, ...], ...]:
    """Return refusals as tuples, or raise where there is none or one is empty."""
    found = tuple(tuple(refusal) for refusal in refusals)
    if not found or not all(found):
        advice = "encode_refusals(tokenizer) makes some."
        raise ValueError(problem(f"refusals is {found!r}", "at least one, each of at least one token id", advice))
    return found


def refused(batch: Batch, refusals: Refusals) -> Batch:
    """Return a batch with a refusal in the place of each row's answer.

    Args:
        batch: Rows with an answer; what stands before the first scored token is the question.
        refusals: Refusing answers as token ids.

    Raises:
        ValueError: If a row has no scored position.

    Examples:
        >>> ids, labels = torch.tensor([[1, 2, 3, 4], [-100, -100, 3, 4]]).chunk(2)
        >>> batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        >>> refused(batch, [(8,)])["labels"]
        tensor([[-100, -100,    8]])
    """
    questions = _questions(batch)
    answers = [_refusal(question, refusals) for question in questions]
    shape = (len(questions), max(len(question) + len(each) for question, each in zip(questions, answers, strict=True)))
    found = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        length = len(question) + len(answer)
        found["input_ids"][row, :length] = torch.tensor([*question, *answer])
        found["labels"][row, len(question) : length] = torch.tensor(answer)
        found["attention_mask"][row, :length] = 1
    return {name: tensor.to(batch["input_ids"].device) for name, tensor in found.items()}


def retargeted(batch: Batch, refusals: Refusals) -> Batch:
    """Return a batch that reads the true answers and is scored by refusals, repeated over each answer's length.

    Raises:
        ValueError: If a row has no scored position.

    Examples:
        >>> ids, labels = torch.tensor([[1, 2, 3, 4], [-100, 2, 3, 4]]).chunk(2)
        >>> batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        >>> retargeted(batch, [(8, 9)])["labels"]
        tensor([[-100,    8,    9,    8]])
    """
    labels = batch["labels"].clone()
    labels[:, 0] = IGNORED
    for row, question in zip(labels, _questions(batch), strict=True):
        scored = row != IGNORED
        refusal = torch.tensor(_refusal(question, refusals), device=row.device)
        row[scored] = refusal[torch.arange(int(scored.sum()), device=row.device) % len(refusal)]
    return {**batch, "labels": labels}


def _questions(batch: Batch) -> list[list[int]]:
    found = []
    rows = zip(*(batch[name].tolist() for name in ("input_ids", "labels", "attention_mask")), strict=True)
    for number, (ids, labels, mask) in enumerate(rows):
        first = next((place for place in range(1, len(ids)) if labels[place] != IGNORED), None)
        if first is None:
            raise ValueError(problem(f"Every label of row {number} is -100", "at least one scored position"))
        found.append([token for token, seen in zip(ids[:first], mask, strict=False) if seen])
    return found


def _refusal(question: Sequence[int], refusals: Refusals) -> Sequence[int]:
    # By the question, so that a batch may be split, and a run resumed, without changing it.
    return refusals[sum(question) % len(refusals)]


def _shannon_from_certain(log_probs: Tensor) -> Tensor:
    """Return the divergence of predictions from certainty of a token, of whose log-probability it is a function."""
    probs = log_probs.exp()
    return math.log(2) + (probs * log_probs - (1 + probs) * torch.log1p(probs)) / 2
