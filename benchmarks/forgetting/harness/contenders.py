"""Who forgets: the published methods, the same on equal terms, masks as controls, low rank, and other objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.planted.column_scores import local_scores
from torch_simu import NeuronSelection, attribute_neurons, whitening
from torch_simu.attribution.attribution import Attribution, Dual
from torch_simu.layers import attention_projections, down_projections, is_neuron_layer, neuron_weight
from torch_simu.unlearning import adversary
from torch_simu.unlearning.data.batches import batches_in_order

if TYPE_CHECKING:
    from benchmarks.forgetting.cases import Case

Unit = Literal["weights", "columns", "shares", "low rank"]
"""What a step size is one of: the change of a weight, of one of a few neurons, of a layer as a share of its norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """How a model is made to forget.

    Args:
        choices: Of an `UnlearnConfig`.
        unit: What its step size is one of.
        steps: Who takes the steps: `unlearn`, or a loop with SOUL's optimizer, with LoRA matrices, or RepSelect's.
        mask: The neurons that train, of a case and a seed; None: those of the configuration.
        within: What a run of it is made in.
    """

    choices: Mapping[str, object]
    unit: Unit
    steps: Literal["unlearn", "soul", "low rank", "collapse"] = "unlearn"
    mask: Callable[[Case, int], NeuronSelection] | None = None
    within: Callable[[], AbstractContextManager[None]] = nullcontext


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The names of all linear layers but the head."""
    head = model.get_output_embeddings()
    return [name for name, layer in model.named_modules() if is_neuron_layer(layer) and layer is not head]


def attention(case: Case, seed: int) -> NeuronSelection:
    """All input features of the attention projections."""
    return NeuronSelection.full(case.model, list(attention_projections(case.model)))


def with_attention(case: Case, seed: int) -> NeuronSelection:
    """All input features of the attention projections, and all neurons."""
    return NeuronSelection.full(case.model, [*down_projections(case.model), *attention_projections(case.model)])


def everywhere(case: Case, seed: int) -> NeuronSelection:
    """All input features of all linear layers."""
    return NeuronSelection.full(case.model, linear_layers(case.model))


def anywhere(case: Case, seed: int) -> NeuronSelection:
    """Random input features of all linear layers, with as many weights as the down projections have."""

    def weights(layers: Mapping[str, nn.Module]) -> int:
        return sum(neuron_weight(layer).numel() for layer in layers.values())

    model = case.model
    names = linear_layers(model)
    share = weights(down_projections(model)) / weights({name: model.get_submodule(name) for name in names})
    return NeuronSelection.random(model, share, torch.Generator().manual_seed(seed), names)


def at_random(share: float) -> Callable[[Case, int], NeuronSelection]:
    """A share of the neurons of each layer."""

    def mask(case: Case, seed: int) -> NeuronSelection:
        return NeuronSelection.random(case.model, share, torch.Generator().manual_seed(seed))

    return mask


def third_by_gradient_activation(case: Case, seed: int) -> NeuronSelection:
    """The three tenths with the largest sum over the forget rows of gradient x activation."""
    rows = case.sets["forget"]
    scores = local_scores(case.model, rows)["gradient_activation"]
    return Attribution({layer: each.sum(0) for layer, each in scores.items()}, {}, len(rows), {}).top(SHARE)


def third_by_dual(dual: Dual) -> Callable[[Case, int], NeuronSelection]:
    """The three tenths with the highest forget scores, without those that are dual, or of these the dual ones alone."""

    def mask(case: Case, seed: int) -> NeuronSelection:
        retain = case.sets["retain"]
        forget_scores, retain_scores = (
            attribute_neurons(case.model, batches_in_order(rows, 32), steps=5, max_completeness_error=None)
            for rows in (case.sets["forget"], retain[:: math.ceil(len(retain) / 60)])
        )
        return forget_scores.top(SHARE, retain=retain_scores, dual=dual)

    return mask


@contextmanager
def slower_adversary() -> Iterator[None]:
    """An automatic rate that takes a fifth of the loss."""
    share = adversary.SHARE
    adversary.SHARE = 0.2
    try:
        yield
    finally:
        adversary.SHARE = share


@contextmanager
def damped_by_all() -> Iterator[None]:
    """Damping relative to the mean of all entries of a diagonal, the largest too."""
    mean = whitening.damping_scale
    whitening.damping_scale = Tensor.mean
    try:
        yield
    finally:
        whitening.damping_scale = mean


SHARE = 0.3
FEW = 0.1
BOUNDED = {"objective": "probability", "balance": True}
STEP = {"method": "simu"}
THIRD = {**STEP, "fraction": SHARE}
FIRST = {"method": "fo_graddiff"}
SECOND = {"method": "so_graddiff"}
ADVERSARY = {"adversary_lr": "auto"}
ALL = {"adversary_scope": "all"}
# Covariances of the forget rows of a step, as the default had them before.
ALONE = {"covariance_of": "forget"}
REHEARSED = {"rehearsal": 400, "retain_term": "kl"}

DEFAULT = "simu"
RIVALS = (
    "first order, all weights, bounded",
    "second order, all weights, bounded",
    "SOUL's steps, all weights, bounded",
)
"""The published steps on all weights, with the default's objective."""
CONTROLS = ("random columns of all layers", "attention only")
"""Masks with as many weights as the default's, or about as many, and its steps."""

MASKS: Mapping[str, Contender] = {
    "every layer": Contender(choices=STEP, unit="shares", mask=everywhere),
    "down projections and attention": Contender(choices=STEP, unit="shares", mask=with_attention),
    "30 % of the neurons, by contrast": Contender(choices=THIRD, unit="shares"),
    "30 % of the neurons, by forget score": Contender(choices={**THIRD, "rule": "top"}, unit="shares"),
    "30 % of the neurons, by forget score, none that are dual": Contender(
        choices=STEP, unit="shares", mask=third_by_dual("drop")
    ),
    "30 % of the neurons, by forget score, dual ones alone": Contender(
        choices=STEP, unit="shares", mask=third_by_dual("isolate")
    ),
    "30 % of the neurons, by an estimate of two passes": Contender(
        choices={**THIRD, "rule": "top", "attribution_budget": 2}, unit="shares"
    ),
    "30 % of the neurons, by gradient x activation": Contender(
        choices=STEP, unit="shares", mask=third_by_gradient_activation
    ),
    "30 % of the neurons, at random": Contender(choices=STEP, unit="shares", mask=at_random(SHARE)),
    "10 % of the neurons, by contrast": Contender(choices={**STEP, "fraction": FEW}, unit="shares"),
    "10 % of the neurons, by forget score": Contender(choices={**STEP, "fraction": FEW, "rule": "top"}, unit="shares"),
    "10 % of the neurons, at random": Contender(choices=STEP, unit="shares", mask=at_random(FEW)),
    "neurons by the paper's threshold": Contender(choices={**STEP, "rule": "threshold"}, unit="shares"),
}
"""The default's steps on other weights than its own, of any number."""
OBJECTIVES: Mapping[str, Contender] = {
    "simu, not balanced": Contender(choices={**STEP, "balance": False}, unit="shares"),
    "simu, not bounded": Contender(choices={**STEP, "objective": "grad_diff"}, unit="shares"),
    "LoRA, bounded": Contender(choices={**FIRST, **BOUNDED}, unit="low rank", steps="low rank"),
    **{
        f"{name}, all weights": Contender(choices={**FIRST, "objective": name.lower()}, unit="weights")
        for name in ("NPO", "SimNPO", "IDK", "DPO", "WGA", "SatImp", "CEU", "UNDIAL", "JensUn", "RMU", "EUL", "ICU")
    },
}
"""The default without a part of its objective, this on low-rank matrices, and others by first order, as published."""

METHODS: Mapping[str, Contender] = {
    DEFAULT: Contender(choices=STEP, unit="shares"),
    "simu with an adversary": Contender(choices={**STEP, **ADVERSARY}, unit="shares", within=slower_adversary),
    "simu with an adversary of all weights": Contender(
        choices={**STEP, **ADVERSARY, **ALL}, unit="shares", within=slower_adversary
    ),
    "simu with an adversary of all weights at 1e-5": Contender(
        choices={**STEP, "adversary_lr": 1e-5, **ALL}, unit="shares"
    ),
    "simu, rehearsed, with an adversary": Contender(choices={**STEP, **REHEARSED, **ADVERSARY}, unit="shares"),
    "simu, rehearsed": Contender(choices={**STEP, **REHEARSED}, unit="shares"),
    "covariances of the forget set": Contender(choices={**STEP, **ALONE}, unit="shares"),
    "covariances of the forget set, with an adversary": Contender(
        choices={**STEP, **ALONE, "adversary_lr": 3e-4}, unit="shares"
    ),
    "covariances of the forget set, with an adversary of all weights": Contender(
        choices={**STEP, **ALONE, "adversary_lr": 3e-4, **ALL}, unit="shares"
    ),
    "covariances of the forget set, rehearsed": Contender(choices={**STEP, **ALONE, **REHEARSED}, unit="shares"),
    "covariances of the forget set, damped by the mean of all": Contender(
        choices={**STEP, **ALONE}, unit="shares", within=damped_by_all
    ),
    **{
        f"{name}, bounded, rehearsed": Contender(choices={**step, **BOUNDED, **REHEARSED}, unit="weights")
        for name, step in {"first order": FIRST, "second order": SECOND}.items()
    },
    "random columns, rehearsed": Contender(choices={**STEP, **REHEARSED}, unit="shares", mask=anywhere),
    "simu, covariance of the neurons alone": Contender(choices={**STEP, "curvature": "neurons"}, unit="shares"),
    # So much damping leaves the plain gradient, at the same length.
    "simu, trust region alone": Contender(choices={**STEP, "damping": 1e6}, unit="shares"),
    "simu without covariances": Contender(choices={**STEP, "curvature": "gnb"}, unit="columns"),
    "fo_graddiff": Contender(choices=FIRST, unit="weights"),
    "so_graddiff": Contender(choices=SECOND, unit="weights"),
    "simu_graddiff": Contender(choices={"method": "simu_graddiff"}, unit="columns"),
    "simu_graddiff, threshold and attention": Contender(
        choices={"method": "simu_graddiff", "rule": "threshold", "attention": "full"}, unit="columns"
    ),
    RIVALS[0]: Contender(choices={**FIRST, **BOUNDED}, unit="weights"),
    # The Gauss-Newton diagonal of the retain set, from labels that the model samples.
    RIVALS[1]: Contender(choices={**SECOND, **BOUNDED}, unit="weights"),
    RIVALS[2]: Contender(choices={**SECOND, **BOUNDED}, unit="weights", steps="soul"),
    "diagonal, critical neurons, bounded": Contender(choices={"method": "simu_graddiff", **BOUNDED}, unit="columns"),
    CONTROLS[0]: Contender(choices=STEP, unit="shares", mask=anywhere),
    CONTROLS[1]: Contender(choices=STEP, unit="shares", mask=attention),
    "RepSelect": Contender(choices=FIRST, unit="shares", steps="collapse"),
}
"""The default, its variants, the published steps and the controls that it is held to."""

CONTENDERS: Mapping[str, Contender] = {**METHODS, **MASKS, **OBJECTIVES}
"""Name -> contender."""
