"""Plan: what a demo will do, and roughly how long that takes on this machine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch_simu.unlearning.config import METHODS
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.demo.fiction import FACTS_EACH
from torch_simu.unlearning.demo.memorize import memorize
from torch_simu.unlearning.demo.models import TAUGHT, Fiction, make_fiction, make_model, models_of
from torch_simu.unlearning.demo.recipe import DemoRecipe

_FORWARD = 1 / 3
"""Cost of a row that is scored, in rows that are trained on."""

_GENERATED = 1.0
"""Cost of a row that is generated."""

_COVARIANCES = 1.6
"""How much longer a step is whose curvature is a covariance."""

_TIMINGS = 5
"""How often a few training steps are timed."""

_STEPS = 0.4
"""Share of the steps at most that a method makes, in the mean of benchmarks/results/demo_cpu_202611.json."""


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """What a demo will do.

    Args:
        costs: Model -> what it takes to make, in rows that are trained on.
        seconds_per_row: How long one such row takes here.
    """

    costs: Mapping[str, float]
    seconds_per_row: float

    @classmethod
    def make(cls, recipe: DemoRecipe | None = None, methods: Sequence[str] = tuple(METHODS)) -> DemoPlan:
        """Count what a demo of a `recipe` has to do for its `methods`, and time a few training steps here."""
        recipe = DemoRecipe() if recipe is None else recipe
        fiction = make_fiction(recipe, 0)
        costs = {name: _cost(name, recipe, fiction) for name in models_of(methods)}
        return cls(costs, _seconds_per_row(recipe, fiction))

    def seconds(self, finished: Collection[str] = ()) -> float:
        """Return roughly how many seconds the models take that are not `finished`."""
        return self.seconds_per_row * sum(cost for name, cost in self.costs.items() if name not in finished)

    def left(self, finished: Collection[str], before: Collection[str], elapsed: float) -> float:
        """Return roughly how long the models take that are not finished, by how long the others took.

        Args:
            finished: Models that are finished.
            before: Those of them that were finished before the time began.
            elapsed: Time since then in seconds.
        """
        expected = self.seconds(before) - self.seconds(finished)
        return self.seconds(finished) * (elapsed / expected if expected > 0 else 1.0)


def about(recipe: DemoRecipe | None = None, methods: Sequence[str] = tuple(METHODS)) -> str:
    """Say in a few sentences what a demo of a `recipe` does with its `methods`."""
    recipe = DemoRecipe() if recipe is None else recipe
    forget, others, target = recipe.num_forget, recipe.num_forget * recipe.retain_per_forget, _target(recipe)
    back = ""
    if recipe.attack is not None:
        every = recipe.attack.attacker_every
        back = f" Every model is then taught one in {every} of them again, to see how much of the others comes back."
    return (
        f"A small Llama learns {FACTS_EACH} facts by heart about each of {forget} fictional people to forget, "
        f"{others} others and {recipe.num_places} places. Then each method makes a copy of it forget the "
        f"{FACTS_EACH * forget} facts about the first{target}: {', '.join(methods)}. One more model never learns "
        f"them.{back}"
    )


def duration(seconds: float) -> str:
    """Say roughly how long something takes, of so many seconds.

    Examples:
        >>> duration(40), duration(50), duration(230)
        ('less than a minute', 'about 1 minute', 'about 4 minutes')
    """
    minutes = max(1, round(seconds / 60))
    if seconds < 45:
        return "less than a minute"
    return f"about {minutes} minute{'' if minutes == 1 else 's'}"


def _target(recipe: DemoRecipe) -> str:
    target = recipe.unlearning.forget_target
    return "" if target is None else f" until the mean probability of those answers is at most {target:g}"


def _cost(name: str, recipe: DemoRecipe, fiction: Fiction) -> float:
    sizes = {each: len(rows) for each, rows in fiction.rows.items()}
    total = sum(sizes.values())
    if name in TAUGHT:
        rows = sum(sizes[each] for each in TAUGHT[name])
        training = recipe.training
        making = rows * (training.epochs + training.epochs // training.check_interval * _FORWARD)
    else:
        config = recipe.unlearning.updated(method=name, **recipe.tuned[name])
        monitored = (total - sizes["forget"]) / config.monitor_interval
        forgotten = config.forget_batch_size * (2 if config.adversary_lr else 1)
        kept = config.retain_batch_size * (2 if config.rehearsal else 1)
        step = forgotten + kept + _FORWARD * (sizes["forget"] + monitored)
        making = _STEPS * config.max_steps * step * (_COVARIANCES if config.whitened else 1.0)
    attacking = 0.0
    if (attack := recipe.attack) is not None:
        taught = min(attack.batch_size, sizes["forget"] / attack.attacker_every)
        attacking = len(attack.rates) * attack.steps * (taught + _FORWARD * sizes["forget"] / attack.interval)
    return making + attacking + total * (_FORWARD + _GENERATED)


def _seconds_per_row(recipe: DemoRecipe, fiction: Fiction) -> float:
    model = make_model(recipe, len(fiction.tokenizer), 0)
    rows = fiction.examples["forget"][: recipe.training.batch_size]
    once, thrice = (dataclasses.replace(recipe.training, epochs=epochs, check_interval=4) for epochs in (1, 3))
    # The first pass makes what later ones find.
    memorize(model, rows, config=once, pad_id=pad_id(fiction.tokenizer))

    def timed() -> float:
        started = time.perf_counter()
        memorize(model, rows, config=thrice, pad_id=pad_id(fiction.tokenizer))
        return time.perf_counter() - started

    # The fastest: on a busy machine one of these short runs may wait for many times as long as it takes.
    return min(timed() for _ in range(_TIMINGS)) / (len(rows) * (3 + _FORWARD))
