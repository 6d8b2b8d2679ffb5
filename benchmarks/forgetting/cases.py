"""Models and rows that they know: the demo's people, facts of a pretrained model."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.pretrained.facts import Fact, facts, plain_texts
from benchmarks.pretrained.model import make_folder
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base
from torch_simu.unlearning.metrics.scoring import score_answers

BATCH = 128


@dataclass(frozen=True)
class Case:
    """A model that knows sets of rows, "forget", "retain" and others, and one that never saw the first.

    `near`, `world` and `text` are known and in no batch, `otherwise` asks for what is forgotten in other words, and
    `unseen` was taught to no model.
    """

    sets: Mapping[str, Sequence[Example]]
    model: PreTrainedModel
    retrained: PreTrainedModel | None
    batch_size: int
    rows: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None

    @functools.cached_property
    def known(self) -> Mapping[str, Sequence[float]]:
        """The probability of each row before anything is forgotten."""
        return {
            name: score_answers(self.model, rows, batch_size=BATCH)["probability"] for name, rows in self.sets.items()
        }


@functools.cache
def demo_case(seed: int) -> Case:
    """The demo's."""
    recipe = DemoRecipe()
    fiction = make_fiction(recipe, seed)
    made = (train_base(fiction, recipe, seed, sets) for sets in (("forget", "retain", "world"), ("retain", "world")))
    return Case(fiction.examples, *made, batch_size=24, rows=fiction.rows, tokenizer=fiction.tokenizer)


KNOWN = 0.1
"""The probability from which on a pretrained model knows a fact."""
TOKENS = 24
"""Of a plain text."""


@functools.cache
def pretrained_case(work: Path, seed: int) -> Case:
    """SmolLM2 and the facts that it knows: 30 capitals to forget, 30 others to keep beside plain text.

    In no batch are: the capitals of yet other countries (near), symbols of elements, languages and continents (world),
    other texts, and the forgotten capitals asked for in other words. No model is there that never saw them.
    """
    folder = make_folder(work / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def encoded(prompt: str, answer: str) -> Example:
        asked, told = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        return Example((*asked, *told), (*[-100] * len(asked), *told))

    def known(found: Iterable[Fact]) -> list[Fact]:
        found = list(found)
        scores = score_answers(model, [encoded(each.prompt, each.answer) for each in found], batch_size=BATCH)
        return [each for each, value in zip(found, scores["probability"], strict=True) if value >= KNOWN]

    of_kind = facts()
    capitals = known(of_kind["capital"])
    random.Random(seed).shuffle(capitals)
    # Only their beginnings: each batch is as long as its longest row, and facts have ten tokens.
    texts = [
        Example(row.input_ids[:TOKENS], row.labels[:TOKENS]) for row in (encoded("", text) for text in plain_texts(32))
    ]
    rows = {
        name: [encoded(each.prompt, each.answer) for each in found]
        for name, found in {
            "forget": capitals[:30],
            "retain": capitals[30:60],
            "near": capitals[60:],
            "world": known(each for kind in ("symbol", "language", "continent") for each in of_kind[kind]),
        }.items()
    }
    rows["retain"] += texts[:16]
    rows["text"] = texts[16:]
    rows["otherwise"] = [encoded(each.otherwise, each.answer) for each in capitals[:30]]
    return Case(rows, model, None, batch_size=10, tokenizer=tokenizer)
