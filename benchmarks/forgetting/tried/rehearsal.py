"""Rehearsal: retain rows that the model writes itself, before it forgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.lasting import Row
from benchmarks.forgetting.tried.configured import configured
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.rehearsal.words import runs

FIRST_WORD = 2
"""The first token id that is no padding and no unknown word."""
RARE = 0.2
"""A word in at most so many of the prompts tells what is asked about."""
Writer = Callable[[Case, torch.Generator, int], list[Example]]


def texts(case: Case, generator: torch.Generator, samples: int, *, length: int = 24) -> list[Example]:
    """What the model writes behind a random token."""
    ids = torch.randint(FIRST_WORD, case.model.config.vocab_size, (samples, 1), generator=generator)
    return [Example(tuple(row), (-100, *row[1:])) for row in _continued(case.model, ids, length, generator).tolist()]


def answers(case: Case, generator: torch.Generator, samples: int) -> list[Example]:
    """What the model answers to retain questions in which what is asked about are random words."""
    retain = case.sets["retain"]
    words = [word for row in retain for word in set(row.prompt_ids)]
    counts = torch.bincount(torch.tensor(words), minlength=case.model.config.vocab_size)
    rare = counts <= RARE * len(retain)
    asked = {row.prompt_ids for row in case.sets["forget"]}
    shapes = [(len(row.prompt_ids), len(row.input_ids)) for row in retain]
    written = []
    for shape in sorted(set(shapes)):
        # Rows of equal length, which are written at once.
        same = torch.tensor([row.prompt_ids for row, own in zip(retain, shapes, strict=True) if own == shape])
        prompts = same[torch.randint(len(same), (len(same) * samples // len(retain),), generator=generator)]
        drawn = torch.randint(FIRST_WORD, len(counts), prompts.shape, generator=generator)
        ids = _continued(case.model, torch.where(rare[prompts], drawn, prompts), shape[1] - shape[0], generator)
        written += [
            Example(tuple(row), (*[-100] * shape[0], *row[shape[0] :]))
            for row in ids.tolist()
            if tuple(row[: shape[0]]) not in asked
        ]
    return written


def rehearsed(
    case: Case,
    seed: int,
    *,
    samples: int,
    writer: Writer = texts,
    run: Callable[..., tuple[PreTrainedModel, Row]] = configured,
    **options: Any,
) -> tuple[PreTrainedModel, Row]:
    """Retain what the model writes, too, but for what shares three tokens with the forget set alone."""
    written = writer(case, torch.Generator().manual_seed(seed), samples)
    own = runs(case.sets["forget"], 3) - runs(case.sets["retain"], 3)
    retain = [*case.sets["retain"], *(row for row in written if not runs([row], 3) & own)]
    made = Case({**case.sets, "retain": retain}, case.model, case.retrained, case.batch_size)
    return run(made, seed, **options)


def _continued(model: PreTrainedModel, ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    with torch.no_grad():
        for _ in range(length):
            chances = model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return ids
