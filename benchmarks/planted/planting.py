"""Planting: a small model learns facts in known columns of its down projections, and in no other weight."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torch_simu import NeuronSelection
from torch_simu.layers import select_layers
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.data.examples import Example, encode
from torch_simu.unlearning.data.rows import rows_from_records
from torch_simu.unlearning.demo.demo import DemoRecipe, make_model
from torch_simu.unlearning.demo.fiction import make_corpus, make_tokenizer
from torch_simu.unlearning.demo.memorize import TrainConfig, memorize
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.objectives import mean_answer_nll

Sets = Mapping[str, Sequence[Example]]
"""Name -> encoded facts: "forget" (the planted ones), "retain", "world" and "unrelated"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantingRecipe:
    """Sizes of the corpus and the model, and how facts are planted."""

    num_forget: int = 12
    retain_per_forget: int = 8
    num_places: int = 27
    d_model: int = 128
    d_ff: int = 512
    num_layers: int = 4
    share: float = 0.2
    training: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=40))
    lr: float = 3e-3
    batch_size: int = 32
    max_steps: int = 400
    check_interval: int = 20
    probability: float = 0.9
    kept: float = 0.99


@dataclass(frozen=True, slots=True)
class Planted:
    """A model with planted facts, the one before, and which columns hold them."""

    model: PreTrainedModel
    base: PreTrainedModel
    selection: NeuronSelection
    sets: Sets
    steps: int


def make_rows(recipe: PlantingRecipe, seed: int) -> dict[str, list[dict[str, str]]]:
    """Write the facts of every set."""
    # Without a topic of their own, planted facts differ from the others in nothing but their names.
    corpus = make_corpus(
        seed,
        num_forget=recipe.num_forget,
        retain_per_forget=recipe.retain_per_forget,
        num_places=recipe.num_places,
        topic_share=0.5,
    )
    cut = len(corpus.retain) * 3 // 4
    return {
        "forget": corpus.forget,
        "retain": corpus.retain[:cut],
        "world": corpus.world,
        "unrelated": corpus.retain[cut:],
    }


def encoded(rows: Mapping[str, Sequence[Mapping[str, str]]]) -> tuple[Sets, int]:
    """The facts of every set as tokens, and how many words they use."""
    tokenizer = make_tokenizer(text for part in rows.values() for row in part for text in row.values())
    return {name: encode(rows_from_records(part), tokenizer) for name, part in rows.items()}, len(tokenizer)


def make_base(recipe: PlantingRecipe, vocabulary: int, seed: int) -> PreTrainedModel:
    """Make a model that knows nothing."""
    return make_model(
        DemoRecipe(d_model=recipe.d_model, d_ff=recipe.d_ff, num_layers=recipe.num_layers), vocabulary, seed
    )


def train_base(model: PreTrainedModel, recipe: PlantingRecipe, sets: Sets, names: Iterable[str], seed: int) -> None:
    """Let a model memorize some sets."""
    config = dataclasses.replace(recipe.training, seed=seed)
    memorize(model, [fact for name in names for fact in sets[name]], config=config)
    model.eval()


def plant(recipe: PlantingRecipe, seed: int) -> Planted:
    """Train a model, then plant the forget set in random columns that keep their norms."""
    sets, vocabulary = encoded(make_rows(recipe, seed))
    base = make_base(recipe, vocabulary, seed)
    train_base(base, recipe, sets, ("retain", "world"), seed)
    model = copy.deepcopy(base)
    selection = NeuronSelection.random(model, recipe.share, torch.Generator().manual_seed(seed))
    planted = Planted(model, base, selection, sets, _plant(model, selection, sets, recipe, seed))
    check_planted(planted)
    return planted


def check_planted(planted: Planted) -> None:
    """Assert what the benchmark rests on: only planted columns moved, none grew, and every fact is memorized."""
    before, after = planted.base.state_dict(), planted.model.state_dict()
    weights = {f"{layer}.weight": layer for layer in planted.selection}
    for name, weight in after.items():
        if name not in weights:
            assert torch.equal(weight, before[name]), f"{name} changed"
            continue
        mask = planted.selection.mask(weights[name])
        assert torch.equal(weight[:, ~mask], before[name][:, ~mask]), f"columns of {name} changed that are not planted"
        torch.testing.assert_close(weight.norm(dim=0), before[name].norm(dim=0), rtol=1e-4, atol=0.0)
    assert knowledge(planted.model, planted.sets["forget"])["em"] == 1.0, "the planted facts are not memorized"


def _plant(model: PreTrainedModel, selection: NeuronSelection, sets: Sets, recipe: PlantingRecipe, seed: int) -> int:
    layers = select_layers(model, selection)
    columns = {name: selection.mask(name) for name in layers}
    weights = {name: cast("nn.Parameter", layer.weight) for name, layer in layers.items()}
    norms = {name: weight.detach().norm(dim=0) for name, weight in weights.items()}
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    # Without decay, a column whose gradient was always zero does not move by a bit.
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    kept = [*sets["retain"], *sets["world"]]
    forget = Batches(sets["forget"], min(recipe.batch_size, len(sets["forget"])), 2 * seed)
    rest = Batches(kept, min(2 * recipe.batch_size, len(kept)), 2 * seed + 1)
    for step in range(recipe.max_steps):
        (mean_answer_nll(model, forget.batch(step)) + 2 * mean_answer_nll(model, rest.batch(step))).backward()
        for name, weight in weights.items():
            cast("Tensor", weight.grad).mul_(columns[name])
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, weight in weights.items():
                mask = columns[name]
                weight[:, mask] *= norms[name][mask] / weight[:, mask].norm(dim=0)
        if (step + 1) % recipe.check_interval == 0:
            known, others = knowledge(model, sets["forget"]), knowledge(model, kept)
            if known["em"] == 1.0 and known["probability"] >= recipe.probability and others["em"] >= recipe.kept:
                break
    model.requires_grad_(True)
    return step + 1


def knowledge(model: PreTrainedModel, examples: Sequence[Example]) -> dict[str, float]:
    """How well a model knows the answers: mean EM, ES and probability."""
    scores = score_answers(model, examples, batch_size=128)
    return {name: mean(scores[name]) for name in ("em", "es", "probability")}


def norm_ratio(model: PreTrainedModel, selection: NeuronSelection) -> float:
    """The mean norm of the planted columns over that of the others, of the layer where it is farthest from 1."""
    ratios = []
    for name, layer in select_layers(model, selection).items():
        norms, mask = layer.weight.detach().norm(dim=0), selection.mask(name)
        ratios.append((norms[mask].mean() / norms[~mask].mean()).item())
    return max(ratios, key=lambda ratio: abs(math.log(ratio)))
