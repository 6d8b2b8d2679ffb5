"""Models and rows that they know: the demo's people, TOFU rows, facts of a pretrained model."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.pretrained.facts import Fact, facts, plain_texts
from benchmarks.pretrained.model import make_folder
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base
from torch_simu.unlearning.demo.memorize import TrainConfig, memorize
from torch_simu.unlearning.metrics.scoring import score_answers

BATCH = 128


@dataclass(frozen=True)
class Case:
    """A model that knows sets of rows, "forget", "retain" and others, and one that never saw the first."""

    sets: Mapping[str, Sequence[Example]]
    model: PreTrainedModel
    retrained: PreTrainedModel | None
    batch_size: int

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
    return Case(fiction.examples, *made, batch_size=24)


@functools.cache
def tofu_case(data: Path, work: Path) -> Case:
    """60 rows to forget, 140 to keep and 117 world facts, each row a question and its answer."""
    full = [json.loads(line) for line in (data / "full.jsonl").read_text().splitlines()]
    world = [json.loads(line) for line in (data / "world_facts.jsonl").read_text().splitlines()]
    rows = {"forget": full[3600:3660], "retain": full[:140], "world": world}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = [f"{row['question']} {row['answer']}" for part in rows.values() for row in part]
    backend.train_from_iterator(texts, trainer)

    def encoded(row: Mapping[str, str]) -> Example:
        prompt = backend.encode(f"Question: {row['question']}\nAnswer:").ids
        answer = [*backend.encode(f" {row['answer']}").ids, special.index("<eos>")]
        return Example((*prompt, *answer), (*[-100] * len(prompt), *answer))

    sets = {name: [encoded(row) for row in part] for name, part in rows.items()}
    made = (
        _memorizing(work / name, [row for part in parts for row in sets[part]], backend.get_vocab_size())
        for name, parts in (("model", tuple(sets)), ("retrained", ("retain", "world")))
    )
    return Case(sets, *made, batch_size=10)


def _memorizing(folder: Path, examples: Sequence[Example], vocabulary: int) -> PreTrainedModel:
    if folder.exists():
        return LlamaForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=256, pad_token_id=0, **sizes))
    memorize(model, examples, config=TrainConfig(epochs=60, batch_size=16))
    model.save_pretrained(folder)
    return model.eval()


KNOWN = 0.1
"""The probability from which on a pretrained model knows a fact."""


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
    texts = [encoded("", text) for text in plain_texts(32)]
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
    return Case(rows, model, None, batch_size=10)
