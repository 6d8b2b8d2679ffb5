"""Models of three million weights that have memorized rows of TOFU or LUME, and ones that never saw some of them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.harness.rows import ROWS, TAUGHT, Sets, tokenizer_of
from benchmarks.forgetting.harness.shapes import SHAPES
from torch_simu.unlearning.data.examples import Example, encode
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction
from torch_simu.unlearning.demo.memorize import TrainConfig, memorize

WIDTH, LAYERS = 192, 4
LENGTHS = {"tofu": None, "lume": 64}
"""Tokens of a row at most: what is to be completed in LUME loses its beginning, no answer is cut."""


@functools.cache
def taught_case(target: str, shape: str, data: Path, work: Path) -> Case:
    """The rows of a target, and a model of a shape that knows them beside one that was taught all but the first set.

    Models are kept in `work`, as `model` and `retrained` of a folder for each target and shape.
    """
    rows = ROWS[target](data)
    tokenizer = tokenizer_of(rows)
    sets = {name: encode(part, tokenizer, max_length=LENGTHS[target]) for name, part in asked(rows).items()}
    # Where the first of these models lie.
    folder = work if (target, shape) == ("tofu", "llama") else work / target / shape
    made = (
        memorizing(
            folder / name,
            [row for part in TAUGHT[skipped:] for row in sets.get(part, ())],
            functools.partial(SHAPES[shape], len(tokenizer), WIDTH, LAYERS),
        )
        for name, skipped in (("model", 0), ("retrained", 1))
    )
    return Case(sets, *made, batch_size=10, rows=rows, tokenizer=tokenizer)


@functools.cache
def quick_case(shape: str) -> Case:
    """A few of the demo's people in a model of a hundred thousand weights, within seconds."""
    fiction = make_fiction(DemoRecipe(num_forget=4, num_places=6), 0)
    sets = dict(fiction.examples)
    torch.manual_seed(0)
    made = []
    for parts in (("forget", "retain", "world"), ("retain", "world")):
        model = SHAPES[shape](len(fiction.tokenizer), 64, 2)
        memorize(
            model, [row for part in parts for row in sets[part]], config=TrainConfig(epochs=30, lr=4e-3, batch_size=8)
        )
        made.append(model.eval())
    return Case(sets, *made, batch_size=6, rows=fiction.rows, tokenizer=fiction.tokenizer)


def asked(rows: Sets) -> Sets:
    """The sets whose answers are scored: wrong answers are for the truth ratio alone."""
    return {name: part for name, part in rows.items() if name != "options"}


def memorizing(folder: Path, examples: Sequence[Example], make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model of a folder; where there is none yet, one that is made and taught."""
    if not folder.exists():
        torch.manual_seed(0)
        model = make()
        em = memorize(model, examples, config=TrainConfig(epochs=60, batch_size=16))
        sys.stderr.write(f"{folder.name}: {model.num_parameters():,} weights, EM {em:.4f} of {len(examples)} rows\n")
        # Under its name once it is whole, so that a run that is stopped leaves no half of it.
        unfinished = folder.with_name(f".{folder.name}")
        model.save_pretrained(unfinished)
        unfinished.rename(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()
