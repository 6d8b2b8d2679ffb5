"""Models: what the demo teaches and makes forget, each model with what is known of it."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from torch_simu.neurons import NeuronSelection
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.examples import Example, encode
from torch_simu.unlearning.data.rows import Row, rows_from_records
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.demo.attacked import relearned
from torch_simu.unlearning.demo.checkpoint import DemoCheckpoint, Finished
from torch_simu.unlearning.demo.fiction import make_corpus, make_tokenizer
from torch_simu.unlearning.demo.memorize import memorize
from torch_simu.unlearning.demo.recipe import DemoRecipe
from torch_simu.unlearning.driver import Unlearned, unlearn
from torch_simu.unlearning.metrics.evaluate import evaluate
from torch_simu.unlearning.progress import Progress, part_of, renamed
from torch_simu.unlearning.report.report import MEASURES, Measures, MethodResult

TAUGHT: Mapping[str, Sequence[str]] = MappingProxyType(
    {"before": ("forget", "retain", "world"), "retrained": ("retain", "world")}
)
"""Model that is taught -> the sets that it learns by heart. All others are made of the first."""


@dataclass(frozen=True, slots=True)
class Fiction:
    """The three sets of the demo, as rows and encoded, with their tokenizer."""

    rows: Mapping[str, Sequence[Row]]
    examples: Mapping[str, Sequence[Example]]
    tokenizer: PreTrainedTokenizerBase


def make_fiction(recipe: DemoRecipe, seed: int) -> Fiction:
    """Write the demo's corpus, of a recipe's size and drawn from the seed, and encode it."""
    corpus = make_corpus(
        seed,
        num_forget=recipe.num_forget,
        retain_per_forget=recipe.retain_per_forget,
        num_places=recipe.num_places,
        topic_share=recipe.topic_share,
    )
    records = {"forget": corpus.forget, "retain": corpus.retain, "world": corpus.world}
    texts = [text for part in records.values() for record in part for text in record.values()]
    tokenizer = make_tokenizer(texts)
    rows = {name: rows_from_records(part, source=name) for name, part in records.items()}
    return Fiction(rows, {name: encode(part, tokenizer) for name, part in rows.items()}, tokenizer)


def make_model(recipe: DemoRecipe, vocabulary: int, seed: int) -> PreTrainedModel:
    """Make the demo's Llama, of a recipe's size and for a vocabulary, with weights drawn from the seed."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_ff,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    # transformers initializes from the global generator only: it is forked, so that the caller's stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast("PreTrainedModel", LlamaForCausalLM(config))


def measured(model: PreTrainedModel, fiction: Fiction, *, progress: Progress | None = None) -> dict[str, Measures]:
    """Measure what a model knows of each set of the `fiction`, told to `progress` as the stage "measure"."""
    # A row counts twice: it is scored, and generated.
    total, done = 2 * sum(map(len, fiction.rows.values())), 0
    found: dict[str, Measures] = {}
    for name, rows in fiction.rows.items():
        told = part_of(renamed(progress, lambda _: "measure"), done, total)
        means = evaluate(model, fiction.tokenizer, rows, batch_size=128, rouge=False, progress=told).means
        found[name] = {key: means[key] for key in MEASURES}
        done += 2 * len(rows)
    return found


def forget_by(
    base: PreTrainedModel,
    fiction: Fiction,
    config: UnlearnConfig,
    *,
    selection: NeuronSelection | None = None,
    attack: AttackConfig | None = None,
    progress: Progress | None = None,
) -> tuple[MethodResult, Unlearned]:
    """Make a copy of `base` forget by one method; `config`, `selection` and `progress` are as in `unlearn`.

    Measured is what it kept of the `fiction`; with an `attack`, also what relearning brings back.
    """
    model = copy.deepcopy(base)
    done = unlearn(
        model,
        fiction.examples["forget"],
        fiction.examples["retain"],
        config=config,
        selection=selection,
        monitor={name: fiction.examples[name] for name in ("retain", "world")},
        pad_id=pad_id(fiction.tokenizer),
        progress=progress,
    )
    sets = measured(model, fiction, progress=progress)
    back = relearned(model, fiction.examples["forget"], attack, progress=progress)
    return MethodResult(sets, done.changed_share, done.optimizer_bytes, done.seconds, done.steps, back), done


def train_base(
    fiction: Fiction,
    recipe: DemoRecipe,
    seed: int,
    sets: Sequence[str],
    *,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Make the model of `recipe` and `seed` and let it memorize the named sets of the `fiction`, told to `progress`."""
    model = make_model(recipe, len(fiction.tokenizer), seed)
    examples = [example for name in sets for example in fiction.examples[name]]
    config = dataclasses.replace(recipe.training, seed=seed)
    memorize(model, examples, config=config, pad_id=pad_id(fiction.tokenizer), progress=progress)
    return cast("PreTrainedModel", model.eval())


def models_of(methods: Sequence[str]) -> list[str]:
    """Return the names of the models of a demo of these `methods`, in the order in which they are made.

    Examples:
        >>> models_of(["simu"])
        ['before', 'simu', 'retrained']
    """
    first, last = TAUGHT
    return [first, *methods, last]


class DemoModels:
    """The models of a demo, made one after the other; what a checkpoint holds is not made again.

    Args:
        recipe: Sizes and choices.
        seed: Of everything random.
        saved: The checkpoint.
        progress: Told of each stage, `MODEL: STAGE`.
    """

    def __init__(
        self, recipe: DemoRecipe, seed: int, saved: DemoCheckpoint | None = None, progress: Progress | None = None
    ) -> None:
        self.fiction = make_fiction(recipe, seed)
        self.recipe, self.seed, self.saved, self.progress = recipe, seed, saved, progress

    def finished(self, name: str) -> Finished:
        """Return what is known of the model `name`, after making it where that is needed."""
        found = None if self.saved is None else self.saved.load(name)
        if found is None:
            found = self._made(name)
            if self.saved is not None:
                self.saved.save(name, found)
        return found

    @cached_property
    def _base(self) -> tuple[PreTrainedModel, float]:
        return self._taught(next(iter(TAUGHT)))

    def _made(self, name: str) -> Finished:
        recipe, fiction, told = self.recipe, self.fiction, renamed(self.progress, f"{name}: {{}}".format)
        if name in TAUGHT:
            model, seconds = self._base if name == next(iter(TAUGHT)) else self._taught(name)
            back = relearned(model, fiction.examples["forget"], recipe.attack, progress=told)
            return Finished(MethodResult(measured(model, fiction, progress=told), 0.0, 0, seconds, 0, back))
        config = recipe.unlearning.updated(method=name, seed=self.seed, **recipe.tuned[name])
        result, done = forget_by(self._base[0], fiction, config, attack=recipe.attack, progress=told)
        return Finished(result, done.log, done.attribution)

    def _taught(self, name: str) -> tuple[PreTrainedModel, float]:
        """Return a model that was taught, and how many seconds that took."""
        if self.saved is not None:
            model = cast("PreTrainedModel", make_model(self.recipe, len(self.fiction.tokenizer), self.seed).eval())
            if (seconds := self.saved.load_taught(name, model)) is not None:
                return model, seconds
        started = time.perf_counter()
        told = renamed(self.progress, f"{name}: {{}}".format)
        model = train_base(self.fiction, self.recipe, self.seed, TAUGHT[name], progress=told)
        seconds = time.perf_counter() - started
        if self.saved is not None:
            self.saved.save_taught(name, model, seconds)
        return model, seconds
