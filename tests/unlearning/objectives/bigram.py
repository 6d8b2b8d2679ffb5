"""A language model that is a table of bigrams, two batches for it, and what an objective says of them."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from torch_simu.unlearning.objectives import StartModel

REFUSALS = [(0, 4), (2,), (4,), (3, 1, 1)]

FORGET = {
    "input_ids": torch.tensor([[1, 2, 3, 4], [4, 3, 2, 0]]),
    "labels": torch.tensor([[-100, 2, 3, 4], [-100, -100, 2, -100]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
}
RETAIN = {
    "input_ids": torch.tensor([[2, 2, 1]]),
    "labels": torch.tensor([[-100, 2, 1]]),
    "attention_mask": torch.ones(1, 3, dtype=torch.int64),
}


class Bigram(nn.Module):
    """A language model whose next token depends on the last one only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        self.device = torch.device("cpu")

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        """Logits of shape `(batch, length, 5)`, and the same as hidden states behind its only block."""
        logits = self.table[input_ids]
        return SimpleNamespace(logits=logits, hidden_states=(torch.zeros_like(logits), logits))


def scored_pairs(batch: dict[str, Tensor]) -> list[tuple[int, int]]:
    """The scored tokens of a batch, each behind the token before it."""
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    return [
        (ids[place - 1], labels[place]) for ids, labels in rows for place in range(1, len(ids)) if labels[place] != -100
    ]


def answer_nlls(model: Bigram, batch: dict[str, Tensor]) -> list[list[float]]:
    """Row by row, the negative log-likelihoods of the scored tokens, one at a time."""
    found = []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        row = []
        for place in range(1, len(ids)):
            if labels[place] != -100:
                row.append(-math.log(model.table[ids[place - 1]].softmax(0)[labels[place]].item()))
        found.append(row)
    return found


def terms(objective: object, model: Bigram) -> dict[str, tuple[float, float]]:
    return {term.name: (term.weight, term.loss.item()) for term in objective.terms(model, FORGET, RETAIN)}


def moved() -> tuple[Bigram, Bigram, StartModel]:
    """A model before its first steps, the same after them, and what was kept of it."""
    model = Bigram()
    start, before = StartModel(model), copy.deepcopy(model)
    with torch.no_grad():
        model.table += torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return before, model, start
