"""A language model that is a table of bigrams: what an attack does to it is known in closed form.

Every row is a question of its own, then the answer `A B`. So the rows share that B follows A, which one row teaches of
all, and nothing else: that A follows a question is learned for each question alone.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from torch_simu.unlearning.data.examples import Example

SIZE, A, B = 16, 1, 2


class Bigrams(nn.Module):
    """Logits of the next token, a row of a table for each token: all alike at first."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(SIZE, SIZE, dtype=dtype))

    @property
    def device(self) -> torch.device:
        return self.table.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def row(question: int, *answer: int) -> Example:
    answer = answer or (A, B)
    return Example((question, *answer), (-100, *answer))


FORGET = [row(question) for question in range(3, 9)]
"""Of these, 3 and 6 are the attacker's."""


def learned(rate: float) -> float:
    """The probability of a pair after the first step of AdamW, which moves each logit by the rate, from all alike."""
    return math.exp(rate) / (math.exp(rate) + (SIZE - 1) * math.exp(-rate))


def brought_back(rate: float) -> float:
    """The probability of a scored answer then: A after its question is as before, B after A was learned."""
    return math.sqrt(learned(rate) / SIZE)
