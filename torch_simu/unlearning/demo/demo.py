"""The demo: a small model memorizes fictional people and places, then forgets some people by every method."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from torch_simu.attribution import Attribution
from torch_simu.neurons import NeuronSelection
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.checkpoint import Record
from torch_simu.unlearning.config import METHODS, UnlearnConfig
from torch_simu.unlearning.data.examples import Example, encode
from torch_simu.unlearning.data.rows import Row, rows_from_records
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.demo.attacked import SHORT_ATTACK, back_note, plot_brought_back, relearned
from torch_simu.unlearning.demo.fiction import make_corpus, make_tokenizer
from torch_simu.unlearning.demo.memorize import TrainConfig, memorize
from torch_simu.unlearning.driver import Unlearned, unlearn
from torch_simu.unlearning.metrics.evaluate import evaluate
from torch_simu.unlearning.progress import Progress, renamed
from torch_simu.unlearning.report.plots import plot_attribution, plot_curves
from torch_simu.unlearning.report.report import Measures, MethodResult, Report, write_log

# Step size and curvature scale of each method: the best of eight by retain EM on seeds that the demo does not show,
# from benchmarks/results/demo_tuning_cpu_202611.json; of simu the defaults.
_TUNED: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "simu": {"lr": 0.04, "fraction": 1.0},
        "fo_graddiff": {"lr": 7e-5},
        "so_graddiff": {"lr": 5e-5, "rho": 100.0},
        "simu_graddiff": {"lr": 1e-3, "rho": 100.0},
        "random_neurons": {"lr": 5e-4, "rho": 0.04},
        "all_neurons": {"lr": 1e-4, "rho": 0.04},
        "attention_only": {"lr": 2e-4, "rho": 100.0},
    }
)


def _shared_choices() -> UnlearnConfig:
    return UnlearnConfig(
        retain_weight=1.0,
        fraction=0.1,
        hessian_interval=5,
        attribution_steps=5,
        max_completeness_error=None,
        forget_batch_size=24,
        retain_batch_size=24,
        hessian_batch_size=24,
        max_steps=250,
        monitor_interval=10,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRecipe:
    """The sizes and choices of the demo.

    Args:
        num_forget: Fictional people to forget, with four facts each.
        retain_per_forget: Retain people for each of them.
        num_places: Fictional places, the world facts.
        topic_share: How far the forget people have a topic of their own; see `make_corpus`.
        d_model: Width of the model.
        d_ff: Neurons of each layer.
        num_layers: Layers.
        training: How the model memorizes.
        unlearning: What all methods have in common.
        tuned: Method -> its own values of the configuration, say `lr`.
        attack: How every model is taught a third of the forget rows again, to see what comes back of the others; None:
            it is not.
    """

    num_forget: int = 20
    retain_per_forget: int = 3
    num_places: int = 27
    topic_share: float = 0.95
    d_model: int = 96
    d_ff: int = 1536
    num_layers: int = 2
    training: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=36))
    unlearning: UnlearnConfig = field(default_factory=_shared_choices)
    tuned: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: _TUNED)
    attack: AttackConfig | None = field(default_factory=lambda: SHORT_ATTACK)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found.

    Attributes:
        report: The table.
        logs: Method -> step log.
        attribution: Scores of the forget set; None when no method needed them.
        start: Set -> EM before unlearning, and the forget probability then.
        target: Forget probability at which methods are compared.
    """

    report: Report
    logs: Mapping[str, Sequence[Record]]
    attribution: Attribution | None
    start: Mapping[str, float]
    target: float | None

    def save(self, folder: Path) -> None:
        """Write report, plots and step logs into a folder."""
        plot_curves(
            self.logs, folder / "forgetting.png", sets=("retain", "world"), start=self.start, target=self.target
        )
        plots = ["forgetting.png"]
        if self.attribution is not None:
            plot_attribution(self.attribution, folder / "attribution.png")
            plots.append("attribution.png")
        plots += plot_brought_back(self.report.methods, folder / "attack.png")
        for method, log in self.logs.items():
            write_log(folder / f"steps_{method}.jsonl", log)
        self.report.save(folder, plots)


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


def measured(model: PreTrainedModel, fiction: Fiction) -> dict[str, Measures]:
    """Measure what a model knows of each set of the demo (`fiction`)."""
    return {
        name: evaluate(model, fiction.tokenizer, rows, batch_size=128, rouge=False).means
        for name, rows in fiction.rows.items()
    }


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
    sets = measured(model, fiction)
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


def run_demo(
    seed: int = 0,
    *,
    recipe: DemoRecipe | None = None,
    methods: Sequence[str] = tuple(METHODS),
    progress: Progress | None = None,
) -> DemoResult:
    """Train a small model on fiction, make it forget by each method, and measure what it kept.

    Every method gets the same data, batches, objective and stopping rule: it stops at the first step after which the
    mean probability of the forget answers is at most the target. World facts are never in a batch.

    Args:
        seed: Of the corpus, the model, the training and the unlearning: the same seed gives the same numbers.
        recipe: Sizes and choices; the default takes a few minutes on two cores.
        methods: Which methods to run.
        progress: See `torch_simu.unlearning.progress.Progress`.

    Returns:
        The table, the step logs and the scores.
    """
    recipe = DemoRecipe() if recipe is None else recipe
    fiction = make_fiction(recipe, seed)

    def trained(stage: str, sets: Sequence[str]) -> tuple[PreTrainedModel, MethodResult]:
        started = time.perf_counter()
        model = train_base(fiction, recipe, seed, sets, progress=renamed(progress, lambda _: stage))
        seconds = time.perf_counter() - started
        told = renamed(progress, f"{stage}: {{}}".format)
        back = relearned(model, fiction.examples["forget"], recipe.attack, progress=told)
        return model, MethodResult(measured(model, fiction), 0.0, 0, seconds, 0, back)

    base, before = trained("train", ("forget", "retain", "world"))
    results: dict[str, MethodResult] = {"before": before}
    logs: dict[str, list[Record]] = {}
    attribution: Attribution | None = None
    for method in methods:
        config = recipe.unlearning.updated(method=method, seed=seed, **recipe.tuned[method])
        told = renamed(progress, f"{method}: {{}}".format)
        results[method], done = forget_by(base, fiction, config, attack=recipe.attack, progress=told)
        attribution = done.attribution or attribution
        logs[method] = done.log
    results["retrained"] = trained("retrain", ("retain", "world"))[1]
    start = {name: before.sets[name]["em"] for name in ("retain", "world")}
    start["forget_probability"] = before.sets["forget"]["probability"]
    report = Report("torch_simu demo: forget fictional people", seed, results, _settings(recipe), _notes(recipe, logs))
    return DemoResult(report, logs, attribution, start, recipe.unlearning.forget_target)


def _settings(recipe: DemoRecipe) -> dict[str, object]:
    settings = dataclasses.asdict(dataclasses.replace(recipe, tuned={}))
    return {**settings, "tuned": {method: dict(values) for method, values in recipe.tuned.items()}}


def _notes(recipe: DemoRecipe, logs: Mapping[str, Sequence[Record]]) -> list[str]:
    target = recipe.unlearning.forget_target
    missed = [method for method, log in logs.items() if log[-1].get("forget_probability", 1.0) > (target or 0.0)]
    notes = [
        "Every method stops at the first step after which the mean probability of the forget answers is at most "
        f"{target}; `retrained` never saw them. World facts are in no batch.",
        "`random_neurons`, `all_neurons` and `attention_only` are controls: they say what choosing neurons is worth.",
    ]
    if recipe.attack is not None:
        notes.append(back_note(recipe.attack))
    if missed and target is not None:
        notes.append(f"Not reached within {recipe.unlearning.max_steps} steps by: {', '.join(missed)}.")
    return notes
