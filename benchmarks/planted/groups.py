"""Groups of people, each planted in neurons of its own whose norms are free: a truth that masks can be held to.

A model learns what is to be kept while the neurons of the groups are silent. A teacher, a copy of it, then learns every
fact with all weights. Another copy learns them, too, but each group through its own neurons alone: first from the
answers, then from the teacher's predictions to the end, so that nothing pulls at the neurons any more but what is left
of that divergence. Any of the other groups may be silent in a step, so that no group mends what another one does. Of a
neuron its column of the down projection trains and its rows of the gate and up projections: columns alone, a twentieth
of them, cannot hold the facts without loss of what is to be kept.
"""

from __future__ import annotations

import copy
import functools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from benchmarks.planted.erasing import zeroed
from benchmarks.planted.planting import PlantingRecipe, Sets, encoded, knowledge, make_base, make_rows, train_base
from torch_simu import NeuronSelection
from torch_simu.layers import down_projections, select_layers
from torch_simu.unlearning.data.batches import Batches, batches_in_order
from torch_simu.unlearning.data.examples import collate
from torch_simu.unlearning.demo.memorize import TrainConfig
from torch_simu.unlearning.metrics.scoring import evaluating
from torch_simu.unlearning.objectives import Batch, answer_predictions, mean_answer_nll

KNOWN_BEFORE = ("retain", "world")
KNOWN = 0.98
"""EM from which on a set counts as known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupsRecipe:
    """Sizes of the corpus and the model, and how the groups are planted.

    Args:
        planting: The sizes, the share of columns of one group, and the teaching: its steps are those of each group.
        num_groups: How many groups.
        distill_steps: Steps of each group that follow the teacher.
    """

    planting: PlantingRecipe = field(
        default_factory=lambda: PlantingRecipe(
            retain_per_forget=5,
            num_places=15,
            d_model=96,
            d_ff=384,
            num_layers=3,
            share=0.05,
            training=TrainConfig(epochs=60, lr=3e-3),
            batch_size=16,
            max_steps=200,
        )
    )
    num_groups: int = 3
    distill_steps: int = 150


@dataclass(frozen=True, slots=True)
class Groups:
    """A model with groups of facts, the one before, which columns hold which group, and how the planting went.

    Args:
        model: The model.
        base: The one before.
        columns: Group -> its columns.
        sets: Group -> its facts, and "retain" and "world".
        told: Steps of teaching, and KL from the teacher in nats a token over all facts, after teaching and at the end.
    """

    model: PreTrainedModel
    base: PreTrainedModel
    columns: Mapping[str, NeuronSelection]
    sets: Sets
    told: Mapping[str, float]


def own_columns(model: PreTrainedModel, num_groups: int, share: float, seed: int) -> list[NeuronSelection]:
    """Of each group as many columns of every down projection, at random; no two groups share one."""
    draw = torch.Generator().manual_seed(seed)
    sizes = {name: layer.in_features for name, layer in down_projections(model).items()}
    orders = {name: torch.randperm(size, generator=draw) for name, size in sizes.items()}
    count = {name: round(share * size) for name, size in sizes.items()}
    return [
        NeuronSelection(
            {name: order[group * count[name] : (group + 1) * count[name]].tolist() for name, order in orders.items()},
            sizes,
        )
        for group in range(num_groups)
    ]


def grouped(rows: Mapping[str, Sequence[Mapping[str, str]]], num_groups: int) -> dict[str, list[Mapping[str, str]]]:
    """The facts to plant in groups, each person's in one of them, and those that are known before."""
    people = sorted({person(row) for row in rows["forget"]})
    found: dict[str, list[Mapping[str, str]]] = {f"group {number + 1}": [] for number in range(num_groups)}
    names = list(found)
    for row in rows["forget"]:
        found[names[people.index(person(row)) % num_groups]].append(row)
    return {**found, **{name: list(rows[name]) for name in KNOWN_BEFORE}}


def person(row: Mapping[str, str]) -> str:
    """Whom a fact is about: the first and the last name."""
    found = re.search(r"[A-Z]\w+ [A-Z]\w+", row["question"])
    assert found is not None, row
    return found[0]


def plant_groups(recipe: GroupsRecipe, seed: int) -> Groups:
    """Train a model, then plant each group in its own neurons, and check that it is there."""
    rows = grouped(make_rows(recipe.planting, seed), recipe.num_groups)
    sets, vocabulary = encoded(rows)
    base = make_base(recipe.planting, vocabulary, seed)
    columns = dict(zip(rows, own_columns(base, recipe.num_groups, recipe.planting.share, seed), strict=False))
    planted = functools.reduce(NeuronSelection.__or__, columns.values())
    with silent(base, planted):
        train_base(base, recipe.planting, sets, KNOWN_BEFORE, seed)
    base = zeroed(base, planted)
    teacher, model = copy.deepcopy(base), copy.deepcopy(base)
    train_base(teacher, recipe.planting, sets, sets, seed)
    phases = Phases(model, teacher, columns, sets, recipe.planting, seed)
    told = {"teaching_steps": phases.teach(), "divergence_taught": phases.divergence()}
    phases.distill(recipe.distill_steps)
    groups = Groups(model, base, columns, sets, {**told, "divergence": phases.divergence()})
    check_groups(groups)
    return groups


@contextmanager
def silent(model: PreTrainedModel, neurons: NeuronSelection) -> Iterator[None]:
    """While it is open neurons write nothing, and learn nothing."""

    def hook(spoken: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
        return lambda _, inputs: (inputs[0] * spoken,)

    layers = select_layers(model, neurons)
    handles = [layer.register_forward_pre_hook(hook(~neurons.mask(name))) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weights_of(model: PreTrainedModel, neurons: NeuronSelection) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Name -> a weight that neurons are of, and where: columns of the down projection, rows of the two before it."""
    found = {}
    for name in neurons:
        block, mask = name.rpartition(".")[0], neurons.mask(name)
        for part, where in (("down_proj", mask[None, :]), ("gate_proj", mask[:, None]), ("up_proj", mask[:, None])):
            found[f"{block}.{part}.weight"] = model.get_parameter(f"{block}.{part}.weight"), where
    return found


def check_groups(groups: Groups) -> None:
    """Assert what the benchmark rests on: no other neuron moved, and every fact is known."""
    before = groups.base.state_dict()
    planted = functools.reduce(NeuronSelection.__or__, groups.columns.values())
    assert planted.num_selected == sum(mask.num_selected for mask in groups.columns.values()), "neurons are shared"
    places = {name: where for name, (_, where) in weights_of(groups.model, planted).items()}
    for name, weight in groups.model.state_dict().items():
        moved = weight != before[name]
        assert not (moved & ~places[name] if name in places else moved).any(), f"{name} changed beside what is planted"
    for name, facts in groups.sets.items():
        em = knowledge(groups.model, facts)["em"]
        assert em >= KNOWN, f"EM of {name} is {em:.3f}"


class Phases:
    """How groups are planted, in turns: a step moves one group's neurons by its own facts and what is known before."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        columns: Mapping[str, NeuronSelection],
        sets: Sets,
        recipe: PlantingRecipe,
        seed: int,
    ) -> None:
        self._model, self._teacher, self._sets, self._recipe = model, teacher, sets, recipe
        self._groups, self._columns, self._draw = list(columns), columns, random.Random(seed)
        self._weights = {group: weights_of(model, mask) for group, mask in columns.items()}
        self._known = [fact for name in KNOWN_BEFORE for fact in sets[name]]
        drawn = {**{group: sets[group] for group in columns}, "known": self._known}
        self._streams = {
            name: Batches(facts, min(recipe.batch_size, len(facts)), len(drawn) * seed + place)
            for place, (name, facts) in enumerate(drawn.items())
        }

    def teach(self) -> int:
        """Teach the answers until each group is known and nothing is lost; the number of steps of each group."""
        optimizers = self._optimizers()
        for step in range(self._recipe.max_steps):
            self._turn(optimizers, step, lambda batch: mean_answer_nll(self._model, batch))
            if (step + 1) % self._recipe.check_interval == 0 and self._taught():
                break
        return step + 1

    def distill(self, steps: int) -> None:
        """Follow the teacher's predictions, with steps that shrink to nothing."""
        optimizers = self._optimizers()
        schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, steps) for each in optimizers.values()]
        for step in range(steps):
            self._turn(optimizers, step, lambda batch: self._from_teacher(batch).mean())
            for schedule in schedules:
                schedule.step()

    def divergence(self) -> float:
        """KL from the teacher, in nats a token, over all facts."""
        facts = [fact for part in self._sets.values() for fact in part]
        with evaluating(self._model):
            return torch.cat([self._from_teacher(batch) for batch in batches_in_order(facts, 128)]).mean().item()

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        # One for each group, and without decay: a weight whose gradient was always zero does not move by a bit.
        options = {"lr": self._recipe.lr, "betas": (0.9, 0.98), "weight_decay": 0.0}
        return {
            group: torch.optim.AdamW([weight for weight, _ in weights.values()], **options)
            for group, weights in self._weights.items()
        }

    def _turn(
        self, optimizers: Mapping[str, torch.optim.Optimizer], step: int, loss: Callable[[Batch], Tensor]
    ) -> None:
        for place, group in enumerate(self._groups):
            known = self._streams["known"].indices(step * len(self._groups) + place)
            own = self._streams[group].indices(step)
            rows = [*(self._sets[group][index] for index in own), *(self._known[index] for index in known)]
            weights = list(self._weights[group].values())
            # Any of the other groups may be absent, so that none of them mends what another one does.
            absent = [mask for name, mask in self._columns.items() if name != group and self._draw.random() < 0.5]
            with ExitStack() as stack:
                for mask in absent:
                    stack.enter_context(silent(self._model, mask))
                gradients = torch.autograd.grad(loss(collate(rows, 0)), [weight for weight, _ in weights])
            for (weight, where), gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient * where
            optimizers[group].step()

    def _from_teacher(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            aim, _ = answer_predictions(self._teacher, batch)
        now, _ = answer_predictions(self._model, batch)
        return functional.kl_div(now, aim, reduction="none", log_target=True).sum(-1)

    def _taught(self) -> bool:
        groups = [knowledge(self._model, self._sets[name]) for name in self._groups]
        known = all(each["em"] == 1.0 and each["probability"] >= self._recipe.probability for each in groups)
        return known and knowledge(self._model, self._known)["em"] >= self._recipe.kept


def without_columns(groups: Groups) -> dict[str, dict[str, float]]:
    """Group -> EM of every set with the group's columns at zero, as they were before."""
    models = {name: zeroed(groups.model, mask) for name, mask in groups.columns.items()}
    return {
        name: {each: knowledge(model, facts)["em"] for each, facts in groups.sets.items()}
        for name, model in models.items()
    }
