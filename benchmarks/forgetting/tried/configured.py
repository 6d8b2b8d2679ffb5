"""The driver's run by covariances of the forget set, the default when most of this was tried, with other choices."""

from __future__ import annotations

from transformers import PreTrainedModel

from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.harness.contenders import Contender
from benchmarks.forgetting.harness.running import forgotten
from benchmarks.forgetting.harness.targets import TARGETS, tuned
from benchmarks.forgetting.lasting import Row
from benchmarks.forgetting.lasting import configured as config_of

LR = 0.04
TARGET = tuned(TARGETS["demo"])


def configured(case: Case, seed: int, **choices: object) -> tuple[PreTrainedModel, Row]:
    """The driver's run."""
    choices = {"method": "simu", "covariance_of": "forget", "paced": False, "lr": LR, **choices}
    contender = Contender(choices=choices, unit="shares")
    return forgotten(case, contender, config_of(case, TARGET, seed, contender), traced=False)
