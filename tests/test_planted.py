"""Facts planted in known columns are there and nowhere else, and exact attribution finds those columns."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from column_scores import RULES, attributed, auc, relative
from erasing import zeroed
from planted import best_rules, found_mask, masks_of, over_seeds, precision, ranked, scored
from planting import PlantingRecipe, check_planted, knowledge, norm_ratio, plant

from torch_simu import attribute_neurons
from torch_simu.unlearning.data import batches_in_order, collate
from torch_simu.unlearning.training import TrainConfig

SMALL = PlantingRecipe(
    num_forget=6,
    retain_per_forget=5,
    num_places=6,
    d_model=96,
    d_ff=384,
    num_layers=3,
    share=0.35,
    training=TrainConfig(epochs=60, lr=3e-3),
    lr=4e-3,
    max_steps=100,
)


@pytest.fixture(scope="module")
def planted():
    """A small model with planted facts."""
    return plant(SMALL, 0)


@pytest.fixture(scope="module")
def found(planted):
    """All scores of all methods on it."""
    return scored(planted, 0, steps=5)


def mean_auc(scores, selection, shift=0):
    return mean(auc(score.roll(shift), selection.mask(name)) for name, score in scores.items())
