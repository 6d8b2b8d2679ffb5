"""Targets: what is forgotten, when a run ends, the step sizes to try, and how a model is attacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.forgetting.cases import BATCH, Case, demo_case, pretrained_case
from benchmarks.forgetting.harness.taught import quick_case, taught_case
from torch_simu.unlearning.attack.config import AttackConfig

LARGEST = {"weights": (5e-4,), "columns": (0.02,), "shares": (0.04,), "low rank": (5e-3,)}
"""The largest step size, by what it is one of. A run begins with a hundredth of it and is paced, as the default is."""
TRIED = {
    "weights": (5e-5, 1e-4, 2e-4),
    "columns": (1e-3, 2e-3, 4e-3),
    "shares": (0.04, 0.08, 0.16),
    "low rank": (5e-4, 1e-3, 2e-3),
}
"""Step sizes to try on a small model, where runs are not paced. LoRA's are ten times those of all weights."""


class Target(NamedTuple):
    """When a run ends, the step sizes to try, what all contenders share, and the attacker's choices."""

    probability: float
    rates: Mapping[str, Sequence[float]]
    shared: Mapping[str, object]
    attack: AttackConfig


SHARED = {"hessian_interval": 5, "max_steps": 500, "eval_interval": 2, "max_completeness_error": None, "paced": True}
FEW_ROWS = {**SHARED, "attribution_steps": 5, "attribution_rows": 60}
# A whole pass through the pretrained model takes seconds.
PLAIN = {**SHARED, "attribution_steps": 3, "attribution_rows": 30, "max_steps": 150, "retain_term": "kl"}
FIXED = {"paced": False, "eval_interval": 3}
ATTACK = AttackConfig(rates=(2e-4, 5e-4, 1e-3), steps=40, interval=10, batch_size=10, eval_batch_size=BATCH)
GENTLE = AttackConfig(rates=(1e-5, 3e-5), steps=30, interval=6, batch_size=10, eval_batch_size=BATCH)
SHORT = AttackConfig(rates=(1e-3,), steps=4, interval=2, batch_size=4, eval_batch_size=BATCH)
TARGETS = {
    "demo": Target(0.1, LARGEST, FEW_ROWS, ATTACK),
    "tofu": Target(0.05, LARGEST, FEW_ROWS, ATTACK),
    "lume": Target(0.05, LARGEST, FEW_ROWS, ATTACK),
    "pretrained": Target(0.05, LARGEST, PLAIN, GENTLE),
    "quick": Target(
        0.5, {unit: rates[-1:] for unit, rates in TRIED.items()}, {**FEW_ROWS, **FIXED, "max_steps": 24}, SHORT
    ),
}
TUNABLE = ("demo", "tofu", "lume")
"""The targets whose models are small enough to try step sizes on."""


def tuned(target: Target) -> Target:
    """The same where each contender tries three fixed step sizes in place of one that is paced."""
    return target._replace(rates=TRIED, shared={**target.shared, **FIXED})


SHAPED = ("tofu", "lume", "quick")
"""The targets that there is a model of every shape for."""


def case_of(target: str, shape: str, seed: int, data: Path | None, work: Path | None) -> Case:
    """The model and the rows of a target."""
    if target == "quick":
        return quick_case(shape)
    if target == "demo":
        return demo_case(seed)
    if work is None or (data is None and target != "pretrained"):
        raise SystemExit(f"--target {target} needs --work, a folder for models, and --data, one with tofu and lume.")
    return pretrained_case(work, seed) if target == "pretrained" else taught_case(target, shape, data, work)
