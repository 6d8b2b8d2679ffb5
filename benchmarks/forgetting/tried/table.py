"""Every variant by name; a plus is between changes that are made together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.harness.contenders import slower_adversary
from benchmarks.forgetting.lasting import Row
from benchmarks.forgetting.tried.configured import LR, configured
from benchmarks.forgetting.tried.ending import UntilUnpredicted
from benchmarks.forgetting.tried.folds import folded
from benchmarks.forgetting.tried.loop import looped
from benchmarks.forgetting.tried.outputs import OfRank
from benchmarks.forgetting.tried.paraphrases import Paraphrased
from benchmarks.forgetting.tried.rehearsal import answers, rehearsed
from benchmarks.forgetting.tried.steps.averaging import Averaged
from benchmarks.forgetting.tried.steps.bound import Bounded
from benchmarks.forgetting.tried.steps.clip import Clipped
from benchmarks.forgetting.tried.steps.subspace import Projected
from benchmarks.forgetting.tried.supporting import Supporting, TowardZero
from torch_simu.unlearning.config import own_choices

Variant = Callable[[Case, int], tuple[PreTrainedModel, Row]]


def slowly(run: Callable[..., tuple[PreTrainedModel, Row]], **choices: Any) -> Variant:
    """The variant with an adversary whose automatic rate takes a fifth of its loss."""

    def variant(case: Case, seed: int) -> tuple[PreTrainedModel, Row]:
        with slower_adversary():
            return run(case, seed, **choices)

    return variant


AT_RANDOM: dict[str, Any] = {"method": "random_neurons", "fraction": 0.3, "paced": False, "lr": LR}
TRAINED: dict[str, Any] = {"adversary_lr": 3e-4}
ALL: dict[str, Any] = {"adversary_lr": 3e-4, "adversary_scope": "all"}
LESS: dict[str, Any] = {"adversary_lr": 1e-4, "adversary_scope": "all"}
# Twice the retain batch, so that as many retain rows are in it as without.
ANSWERS: dict[str, Any] = {"samples": 400, "writer": answers, "retain_term": "kl", "retain_batch_size": 48}

BOTH = ("forget", "retain")
# The default with an adversary, which every other change below it is made beside.
LASTING: dict[str, Any] = {
    "paced": True,
    "eval_interval": 2,
    "covariance_of": "both",
    "adversary_lr": "auto",
    "adversary_scope": "all",
}
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "the trained weights alone relearn": {"adversary_scope": "trained"},
    "it starts anew every 5 steps": {"adversary_interval": 5},
    "at 1e-4": {"adversary_lr": 1e-4},
    "half the step size": {"lr": 0.02},
    "damping 0.3": {"damping": 0.3},
    "damping 0.03": {"damping": 0.03},
    "refreshed at every step": {"hessian_interval": 1},
    "covariances of more steps": {"betas": (0.9, 0.95)},
    "retain term KL": {"retain_term": "kl"},
    "retain weight 4": {"retain_weight": 4.0},
    "twice the retain rows": {"retain_batch_size": 48},
    "units": {"units": True},
}
"""What was changed of the default with an adversary, beside it."""

VARIANTS: Mapping[str, Variant] = {
    "covariances of the forget set": configured,
    "the same as a plain loop": looped,
    "retain term KL": partial(configured, retain_term="kl"),
    "retain weight 4": partial(configured, retain_weight=4.0),
    "objective NPO": partial(configured, objective="npo"),
    "objective SimNPO": partial(configured, objective="simnpo"),
    "objective SatImp": partial(configured, objective="satimp"),
    "curvature of the neurons only": partial(configured, curvature="neurons"),
    "covariance of the outputs of rank 8": partial(looped, kind=OfRank, rank=8),
    "covariance of the outputs of rank 32": partial(looped, kind=OfRank, rank=32),
    "covariances of the retain set": partial(looped, covariance_of=("retain",)),
    "covariances of both sets": partial(looped, covariance_of=BOTH),
    "trust region alone": partial(configured, damping=1e6),
    "10 % of the neurons, contrast": partial(configured, fraction=0.1),
    "30 % of the neurons, contrast": partial(configured, fraction=0.3),
    "30 % of the neurons, at random": partial(configured, **{**own_choices("simu"), **AT_RANDOM}),
    "units: gate and up rows, too": partial(configured, units=True),
    "neurons that support the forget set": partial(looped, kind=Supporting),
    "... and toward zero only": partial(looped, kind=TowardZero),
    "leading 30 % of the directions": partial(looped, kind=Projected, share=0.3, leading=True),
    "trailing 30 % of the directions": partial(looped, kind=Projected, share=0.3, leading=False),
    "four layered folds": partial(folded, folds=4),
    "forget rows in other words, too": partial(looped, kind=Paraphrased),
    "step by the predicted retain loss, 1e-4": partial(looped, kind=Bounded, lr=0.08, bound=1e-4),
    "step by the predicted retain loss, 0.01": partial(looped, kind=Bounded, lr=0.08, bound=0.01),
    "Sophia's clip, 5e-4": partial(looped, kind=Clipped, clipped_lr=5e-4),
    "Sophia's clip, 1e-3": partial(looped, kind=Clipped, clipped_lr=1e-3),
    "Sophia's clip, 2e-3": partial(looped, kind=Clipped, clipped_lr=2e-3),
    "to 0.05": partial(looped, probability=0.05),
    "to 0.02": partial(looped, probability=0.02),
    "to the EM of the retrained": partial(looped, kind=UntilUnpredicted),
    "half the step size": partial(configured, lr=0.02),
    "200 texts of its own rehearsed": partial(rehearsed, samples=200),
    "400 answers of its own rehearsed": partial(rehearsed, **ANSWERS),
    "adversary, trained weights": partial(configured, **TRAINED),
    "adversary, all weights": partial(configured, **ALL),
    "adversary, all weights, 1e-4": partial(configured, **LESS),
    "adversary, all weights + half the step size": partial(configured, **ALL, lr=0.02),
    "adversary, all weights, every second step": partial(looped, adversary_lr=3e-4, adversary_every=2),
    "adversary, all weights, 1e-4 + covariances of both sets": partial(looped, adversary_lr=1e-4, covariance_of=BOTH),
    "adversary, all weights, 1e-4, every second step + covariances of both sets": partial(
        looped, adversary_lr=1e-4, adversary_every=2, covariance_of=BOTH
    ),
    "adversary, all weights + covariances of both sets": partial(looped, adversary_lr=3e-4, covariance_of=BOTH),
    "adversary, trained weights + covariances of both sets": partial(
        looped, adversary_lr=3e-4, adversary_scope="trained", covariance_of=BOTH
    ),
    "adversary, all weights, auto + covariances of both sets": slowly(looped, adversary_lr="auto", covariance_of=BOTH),
    "adversary, trained weights, auto + covariances of both sets": slowly(
        looped, adversary_lr="auto", adversary_scope="trained", covariance_of=BOTH
    ),
    "adversary, all weights, 1e-4 + covariances of the retain set": partial(
        looped, adversary_lr=1e-4, covariance_of=("retain",)
    ),
    "adversary, all weights, from 0.3 on": partial(looped, adversary_lr=3e-4, adversary_from=0.3),
    "adversary, all weights, that retains": partial(looped, adversary_lr=3e-4, adversary_retains=True),
    "adversary, all weights + averaged over steps": partial(looped, kind=Averaged, decay=0.95, adversary_lr=3e-4),
    "adversary, all weights + outputs of rank 8": partial(looped, kind=OfRank, rank=8, adversary_lr=3e-4),
    "adversary, all weights + 200 texts": partial(rehearsed, samples=200, **ALL),
    "adversary, all weights + 400 answers": partial(rehearsed, **ANSWERS, **ALL),
    "adversary, all weights + 400 answers + half the step size": partial(rehearsed, **ANSWERS, **ALL, lr=0.02),
    "adversary, all weights, 1e-4 + 400 answers": partial(rehearsed, **ANSWERS, **LESS),
    "adversary, all weights, 1e-4 + 400 answers + half the step size": partial(rehearsed, **ANSWERS, **LESS, lr=0.02),
    "adversary, all weights, 1e-4 + leading 30 % of the directions": partial(
        looped, kind=Projected, share=0.3, leading=True, adversary_lr=1e-4
    ),
    "adversary, trained weights + 400 answers + half the step size": partial(rehearsed, **ANSWERS, **TRAINED, lr=0.02),
    **{
        " + ".join(filter(None, ("default of now", "adversary of all weights", name))): slowly(
            configured, **{**LASTING, **change}
        )
        for name, change in CHANGES.items()
    },
}
