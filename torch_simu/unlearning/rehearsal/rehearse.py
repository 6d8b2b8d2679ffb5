"""rehearse: rows like those to keep, about random words, with the answers that the model gives before it forgets."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from torch_simu._checks import check_count, problem
from torch_simu.bitsandbytes.packing import codes_as_loaded
from torch_simu.curvature import IGNORED
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.data.fits import check_fits
from torch_simu.unlearning.metrics.scoring import evaluating
from torch_simu.unlearning.progress import Progress
from torch_simu.unlearning.rehearsal.words import common_ids, cut_behind, runs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RUN = 3
"""So many tokens in a row that the forget set has and the retain set has not are the forget set's."""


def rehearse(
    model: PreTrainedModel,
    retain: Sequence[Example],
    number: int,
    *,
    forget: Sequence[Example] = (),
    seed: int = 0,
    batch_size: int = 32,
    pad_id: int = 0,
    progress: Progress | None = None,
) -> list[Example]:
    """Let a model write rows itself that are like those to keep, to retain them beside these while it forgets.

    What a retain set does not name is changed along with what is forgotten. So prompts are drawn from it, the words in
    them that tell what is asked about are replaced by random words of both sets, and the model answers, sampling at a
    temperature of one: answers about nothing in particular say how it answers at all. It is called rehearsal since
    Robins 1995; of language models that write it themselves Huang et al. 2024 (arXiv 2403.01244).

    Args:
        model: A causal language model, before the first step.
        retain: Encoded rows to keep. Of one without a prompt the first word is drawn, and the model goes on.
        number: How many rows to write. Less come back where the model writes of the forget set.
        forget: Encoded rows to forget. What is asked as one of them is, or has three tokens in a row that only they
            have, is left out.
        seed: Of prompts, words and answers. The global generators are not used up.
        batch_size: Rows per call of `model.generate`.
        pad_id: The token id to pad with.
        progress: Told of the stage "rehearse" after each batch, in rows.

    Returns:
        Rows as `retain` has them, of at most the length that the row has whose prompt was taken.

    Raises:
        ValueError: If there is no retain row, a size is not positive, or 4-bit codes were packed for inference.
        DataError: If a row does not fit into the model.
    """
    check_count("number", number)
    check_count("batch_size", batch_size)
    if not retain:
        raise ValueError(problem("There is no retain row to take a prompt from", "at least one"))
    check_fits(model, retain)
    # Of similar length side by side, so that little is padded.
    asked = sorted(_asked(retain, forget, number, random.Random(seed)), key=lambda row: len(row.input_ids))
    known = {row.prompt_ids for row in forget}
    theirs = runs(forget, _RUN) - runs(retain, _RUN)
    ends = {row.end_ids for row in retain if row.num_end}
    written: list[Example] = []
    done = 0
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    # Codes that were packed for inference could not be trained beside afterwards.
    with torch.random.fork_rng(devices), codes_as_loaded(model), evaluating(model):
        torch.manual_seed(seed)
        for start in range(0, len(asked), batch_size):
            rows = asked[start : start + batch_size]
            found = [
                _written(row, ids, ends) for row, ids in zip(rows, _continued(model, rows, pad_id, ends), strict=True)
            ]
            written += [row for row in found if row.prompt_ids not in known and not runs([row], _RUN) & theirs]
            done += len(rows)
            if progress is not None:
                progress("rehearse", done, len(asked))
    return written


def _asked(retain: Sequence[Example], forget: Sequence[Example], number: int, draw: random.Random) -> list[Example]:
    """Return retain rows, drawn one by one, whose prompts ask about random words."""
    prompts = [row.prompt_ids for row in retain if row.prompt_ids]
    common = common_ids(prompts)
    ends = {token for row in (*retain, *forget) for token in row.end_ids}
    words = sorted({token for row in (*retain, *forget) for token in row.input_ids} - common - ends)
    if not words:
        return [draw.choice(retain) for _ in range(number)]
    found = []
    for _ in range(number):
        row = draw.choice(retain)
        # A text begins with a word of its own, behind which it is written.
        length = max(1, len(row.prompt_ids))
        ids = [token if token in common else draw.choice(words) for token in row.input_ids[:length]]
        labels = [IGNORED] * length + list(row.input_ids[length:])
        found.append(replace(row, input_ids=(*ids, *row.input_ids[length:]), labels=tuple(labels), num_end=0))
    return found


def _continued(
    model: PreTrainedModel, rows: Sequence[Example], pad_id: int, ends: set[tuple[int, ...]]
) -> list[list[int]]:
    """Return what the model says behind each prompt, as many tokens as the longest answer has."""
    from transformers import GenerationConfig

    width = max(len(row.prompt_ids) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row.prompt_ids)) + list(row.prompt_ids) for row in rows])
    mask = torch.tensor([[0] * (width - len(row.prompt_ids)) + [1] * len(row.prompt_ids) for row in rows])
    sampling = GenerationConfig(
        max_new_tokens=max(row.num_scored for row in rows),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=pad_id,
        # What is not finite is told by the first step, with the loss.
        remove_invalid_values=True,
        eos_token_id=sorted(end[0] for end in ends if len(end) == 1) or None,
    )
    generate = cast("Callable[..., Tensor]", model.generate)
    device = next(model.parameters()).device
    output = generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=sampling)
    told: list[list[int]] = output[:, width:].tolist()
    return told


def _written(row: Example, ids: Sequence[int], ends: set[tuple[int, ...]]) -> Example:
    """Return a row's prompt with what was said behind it, which is no longer than the row's own answer."""
    prompt, said = row.prompt_ids, tuple(ids[: row.num_scored])
    said = said[: cut_behind(said, ends)]
    num_end = max((len(end) for end in ends if said[len(said) - len(end) :] == end), default=0)
    return Example((*prompt, *said), (*[IGNORED] * len(prompt), *said), f"{row.place} rehearsed".strip(), num_end)
