"""A demo of a second or two, and one that gets a signal when it comes to a stage."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from torch_simu.cli.bars import staged
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.config import METHODS, UnlearnConfig
from torch_simu.unlearning.demo import demo, plan
from torch_simu.unlearning.demo.memorize import TrainConfig
from torch_simu.unlearning.demo.recipe import DemoRecipe

TINY = DemoRecipe(
    num_forget=3,
    retain_per_forget=1,
    num_places=2,
    d_model=16,
    d_ff=16,
    num_layers=1,
    training=TrainConfig(epochs=3, lr=1e-2, batch_size=12, check_interval=2),
    unlearning=UnlearnConfig(
        max_steps=2,
        forget_target=0.0,
        attribution_steps=1,
        max_completeness_error=None,
        forget_batch_size=6,
        retain_batch_size=6,
    ),
    tuned={method: {"lr": 5e-3} for method in METHODS},
    attack=AttackConfig(rates=(1e-2,), steps=2, interval=1),
)


@contextmanager
def tiny_command(methods: Sequence[str] = tuple(METHODS)) -> Iterator[None]:
    """Let `torch-simu demo` be that demo in the block."""
    run, report, make, about = demo.run_demo, demo.empty_report, plan.DemoPlan.make, plan.about
    with (
        patch.object(demo, "empty_report", lambda seed, recipe=TINY: report(seed, recipe)),
        patch.object(demo, "run_demo", lambda seed, **told: run(seed, recipe=TINY, methods=methods, **told)),
        patch.object(plan.DemoPlan, "make", lambda: make(TINY, methods)),
        patch.object(plan, "about", lambda: about(TINY, methods)),
    ):
        yield


@contextmanager
def signaled(stage: str, number: signal.Signals) -> Iterator[None]:
    """Let the command send itself a signal when it comes to a stage."""

    @contextmanager
    def stopping(*arguments: object) -> Iterator[object]:
        with staged(*arguments) as progress:

            def tell(name: str, *told: object) -> None:
                progress(name, *told)
                if name == stage:
                    os.kill(os.getpid(), number)

            yield tell

    with patch("torch_simu.cli.commands.demo.staged", stopping):
        yield
