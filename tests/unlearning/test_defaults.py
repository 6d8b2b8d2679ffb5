"""Each default is decided once: whatever takes an option takes the same one where it is not given."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import typer

from torch_simu import NeuronSelection, SIMUOptimizer, attribute_neurons
from torch_simu.cli.app import app
from torch_simu.unlearning.config import UnlearnConfig, own_choices
from torch_simu.unlearning.objectives import GradDiff, make_objective
from torch_simu.unlearning.trainer.trainer import SIMUOptimizerFactory

PUBLISHED = UnlearnConfig(method="simu_graddiff")


def published(
    *,
    lr: float = PUBLISHED.lr,
    betas: tuple[float, float] = PUBLISHED.betas,
    hessian_interval: int = PUBLISHED.hessian_interval,
) -> None:
    """What a configuration of the published method has, as defaults."""


TAKERS: dict[str, Callable[..., object]] = {
    "SIMUOptimizer": SIMUOptimizer,
    "published": published,
    "UnlearnConfig": UnlearnConfig,
    "GradDiff": GradDiff,
    "make_objective": make_objective,
    "param_groups": NeuronSelection.param_groups,
    "SIMUOptimizerFactory": SIMUOptimizerFactory.__call__,
}


def defaults(taker: Callable[..., object]) -> dict[str, object]:
    parameters = inspect.signature(taker).parameters.items()
    return {name: each.default for name, each in parameters if each.default is not inspect.Parameter.empty}


@pytest.mark.parametrize(
    "option", ["attention", "retain_weight", "hessian_interval", "lr", "betas", "rho", "weight_decay", "clip"]
)
def test_whatever_takes_an_option_has_the_same_default(option: str) -> None:
    found = {name: defaults(taker)[option] for name, taker in TAKERS.items() if option in defaults(taker)}
    # None stands for what the method has of its own, which the published one has from the optimizer.
    found = {name: value for name, value in found.items() if value is not None}
    assert len(found) >= 2
    assert len(set(found.values())) == 1, found


def test_the_attribution_of_a_run_has_the_steps_of_attribute_neurons() -> None:
    assert UnlearnConfig().attribution_steps == defaults(attribute_neurons)["steps"]
    assert UnlearnConfig().attribution_method == defaults(attribute_neurons)["method"]


def test_the_command_line_has_the_defaults_of_the_configuration() -> None:
    config, seen = UnlearnConfig(), 0
    commands = typer.main.get_command(app).commands
    for name in ("unlearn", "attribute"):
        for option in commands[name].params:
            # An attribution without a retain set cannot contrast.
            if hasattr(config, option.name) and (name, option.name) != ("attribute", "rule"):
                own = name == "unlearn" and option.name in own_choices(config.method)
                wanted = None if own else getattr(PUBLISHED, option.name)
                assert option.default == (config.method if option.name == "method" else wanted), option.name
                seen += 1
    assert seen >= 27


def test_the_optimizer_and_the_groups_have_the_defaults_of_the_contract() -> None:
    wanted = {"lr": 1e-4, "betas": (0.965, 0.99), "rho": 0.04, "eps": 1e-12, "weight_decay": 0.0, "clip": 1.0}
    assert wanted.items() <= defaults(SIMUOptimizer).items()
    assert defaults(SIMUOptimizer)["hessian_interval"] == 10
    assert defaults(NeuronSelection.param_groups)["attention"] == "frozen"
