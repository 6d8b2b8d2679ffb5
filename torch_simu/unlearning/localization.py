"""Localization: the first step, which neurons or parameters a run trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from torch_simu.attribution import Attribution, attribute_neurons, check_complete
from torch_simu.attribution.estimate.limit import budget_of
from torch_simu.layers import down_projections
from torch_simu.neurons import NeuronSelection
from torch_simu.unlearning.checkpoint import RunCheckpoint
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.batches import batches_in_order
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.data.fits import check_fits
from torch_simu.unlearning.progress import Progress, counted


def choose_neurons(
    model: PreTrainedModel,
    forget: Sequence[Example],
    retain: Sequence[Example],
    config: UnlearnConfig,
    *,
    pad_id: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[NeuronSelection, Attribution]:
    """Do the first step alone: attribute the sets and select the critical neurons by the configured rule.

    Args:
        model: A causal language model.
        forget: Encoded rows to forget.
        retain: Encoded rows to keep; at most `config.attribution_rows` of them, evenly spread, are attributed.
        config: Rule, fraction, threshold, scope and the options of the attribution.
        pad_id: The token id to pad with.
        resume: A file for partial sums, so that a killed attribution goes on.
        progress: See `Progress`.

    Returns:
        The critical neurons, and the forget set's attribution.
    """

    def scores(stage: str, examples: Sequence[Example]) -> Attribution:
        check_fits(model, examples)
        found = attribute_neurons(
            model,
            batches_in_order(examples, 32, pad_id),
            select=config.layers,
            steps=config.attribution_steps,
            budget=None if config.attribution_budget is None else budget_of(config.attribution_budget),
            method=config.attribution_method,
            resume=None if resume is None else f"{resume}.{stage.split()[-1]}",
            progress=counted(progress, stage),
            max_completeness_error=None,
            generator=torch.Generator().manual_seed(config.seed),
        )
        if config.max_completeness_error is not None:
            check_complete(found, config.max_completeness_error)
        return found

    attribution = scores("attribute forget", forget)
    if config.rule == "threshold":
        return attribution.select(config.threshold, scope=config.scope), attribution
    if config.rule == "top":
        return attribution.top(config.fraction, scope=config.scope), attribution
    stride = max(1, math.ceil(len(retain) / config.attribution_rows))
    contrast = attribution.contrast(scores("attribute retain", retain[::stride]))
    return contrast.top(config.fraction, scope=config.scope), attribution


def localize(
    model: PreTrainedModel,
    forget: Sequence[Example],
    retain: Sequence[Example],
    config: UnlearnConfig,
    *,
    selection: NeuronSelection | None = None,
    pad_id: int = 0,
    checkpoint: RunCheckpoint | None = None,
    progress: Progress | None = None,
) -> tuple[NeuronSelection | None, Attribution | None]:
    """Say which neurons the configured method trains; None where it trains whole parameters.

    `model`, `forget`, `retain`, `config`, `pad_id` and `progress` are those of `choose_neurons`; a given `selection` is
    returned as it is, and a `checkpoint` that holds the first step spares it.
    """
    if selection is not None:
        return selection, None
    layers = None if config.layers is None else list(down_projections(model, config.layers))
    match config.where:
        case "critical" if config.fraction == 1 and config.rule != "threshold":
            # All of them, whatever their scores are.
            return NeuronSelection.full(model, layers), None
        case "critical":
            if checkpoint is not None and (found := checkpoint.localized()) is not None:
                return found
            resume = None if checkpoint is None else checkpoint.folder / "attribution"
            found = choose_neurons(model, forget, retain, config, pad_id=pad_id, resume=resume, progress=progress)
            if checkpoint is not None:
                checkpoint.save_localized(*found)
            return found
        case "random":
            draw = torch.Generator().manual_seed(config.seed)
            return NeuronSelection.random(model, config.fraction, draw, layers), None
        case "every_neuron":
            return NeuronSelection.full(model, layers), None
        case _:
            return None, None
