"""Erasing planted facts with one mask or another, and what comes back when the model learns again."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from benchmarks.planted.planting import Planted, knowledge
from torch_simu import NeuronSelection
from torch_simu.layers import select_layers
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.objectives import mean_answer_nll

ERASING = UnlearnConfig(
    # The demo's step for critical neurons, tuned there and not here, for every mask.
    lr=1e-3,
    rho=100.0,
    retain_weight=1.0,
    hessian_interval=5,
    forget_batch_size=24,
    retain_batch_size=24,
    hessian_batch_size=24,
    max_steps=200,
    monitor_interval=1000,
    forget_target=0.1,
)
RELEARN_STEPS, RELEARN_LR, RELEARN_BATCH = 30, 1e-4, 16


def erased(planted: Planted, mask: NeuronSelection, seed: int) -> tuple[PreTrainedModel, dict[str, object]]:
    """Forget the planted facts by steps on the masked columns only."""
    model = copy.deepcopy(planted.model)
    config = ERASING.updated(seed=seed)
    done = unlearn(model, planted.sets["forget"], planted.sets["retain"], config=config, selection=mask)
    return model, {"steps": done.steps, "reached": done.reached}


def zeroed(model: PreTrainedModel, mask: NeuronSelection) -> PreTrainedModel:
    """A copy of the model without the masked columns."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in select_layers(model, mask).items():
            layer.weight[:, mask.mask(name)] = 0.0
    return model


def relearned(model: PreTrainedModel, facts: Sequence[Example], seed: int) -> PreTrainedModel:
    """A copy of the model after a few steps on some facts, all weights."""
    model = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RELEARN_LR, weight_decay=0.0)
    batches = Batches(facts, min(RELEARN_BATCH, len(facts)), seed)
    for step in range(RELEARN_STEPS):
        mean_answer_nll(model, batches.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def recovery(model: PreTrainedModel, planted: Planted, seed: int) -> dict[str, dict[str, float]]:
    """What a model knows of two thirds of the planted facts: as it is, after learning the other third, and after
    learning unrelated facts."""
    facts = planted.sets["forget"]
    shown, hidden = facts[: len(facts) // 3], facts[len(facts) // 3 :]
    return {
        "hidden": knowledge(model, hidden),
        "hidden_after_a_third": knowledge(relearned(model, shown, seed), hidden),
        "hidden_after_unrelated": knowledge(relearned(model, planted.sets["unrelated"], seed), hidden),
    }
