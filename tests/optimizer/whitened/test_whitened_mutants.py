"""The laws of the whitened step fail on steps, states and loading that break them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests import mutants
from tests.optimizer.whitened import whitened
from tests.optimizer.whitened.whitened import OPTIONS, small
from tests.strategies import Options
from torch_simu import SIMUOptimizer
from torch_simu.optimizer.stepping import trust

pytestmark = pytest.mark.usefixtures("device")

STRONG = Options(lr=0.5, beta1=0.5, beta2=0.9, rho=1.0, weight_decay=1.0, clip=0.5, interval=2)


class ForgetsTheFactors(SIMUOptimizer):
    """Goes on from covariances that say nothing."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for key in state:
                if key.endswith("_factor"):
                    state[key] = torch.eye(len(state[key]), dtype=state[key].dtype)


@pytest.mark.parametrize(
    ("mutant", "dim"),
    [
        (mutants.DecaysEveryColumn, -1),
        (mutants.RoundsTheWholeWeight, -1),
        (mutants.DecaysEveryColumn, 0),
    ],
)
def test_law_1_fails_when_other_weights_move(mutant: Any, dim: int) -> None:
    case = (small(dim=dim), STRONG, torch.float32, 0)
    whitened.unselected_weights_stay(SIMUOptimizer, *case)
    with mutants.implementation(mutant) as implementation, pytest.raises(AssertionError):
        whitened.unselected_weights_stay(implementation, *case)


@pytest.mark.parametrize("mutant", [mutants.keeps_dense_state, mutants.keeps_a_third_moment])
def test_law_2_fails_on_state_that_is_not_compact(mutant: Any) -> None:
    with mutants.implementation(mutant) as implementation, pytest.raises(AssertionError):
        whitened.state_is_compact(implementation, small(), OPTIONS, 0, "neurons")


@pytest.mark.parametrize(
    ("mutant", "curvature"),
    [
        (mutants.forgets_the_damping, "neurons"),
        (mutants.whitens_nothing, "neurons"),
        (mutants.whitens_the_outputs_with_the_neurons, "both"),
        (mutants.moves_by_its_own_length, "neurons"),
        (mutants.keeps_its_length, "neurons"),
        (mutants.forgets_the_covariance_before, "neurons"),
    ],
)
def test_law_3_fails_on_another_step(mutant: Any, curvature: str) -> None:
    with mutants.implementation(mutant) as implementation, pytest.raises(AssertionError):
        whitened.steps_match_dense_inverses(implementation, small(), OPTIONS, 0, curvature)


def test_law_3_fails_when_positions_count_that_no_scored_one_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_simu.hooks import record

    monkeypatch.setattr(record, "_reached", mutants.counts_every_position(record._reached))
    with pytest.raises(AssertionError):
        whitened.steps_match_dense_inverses(SIMUOptimizer, small(), OPTIONS, 0, "neurons")


def test_law_4_fails_on_steps_without_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    whitened.steps_are_bounded(SIMUOptimizer, small(), OPTIONS, 0)
    # Without decay what a step adds is made, and not the weight behind it.
    monkeypatch.setattr(trust, "trust_update_", mutants.keeps_its_length(trust.trust_update_))
    with pytest.raises(AssertionError):
        whitened.steps_are_bounded(SIMUOptimizer, small(), OPTIONS, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("mutant", [mutants.forgets_the_finite_check, mutants.skips_in_silence])
def test_law_4_fails_when_numbers_that_are_not_finite_go_through(mutant: Any, bad: float) -> None:
    whitened.non_finite_numbers_change_nothing(SIMUOptimizer, small(), OPTIONS, 0, bad)
    # A factor of what is not finite has no Cholesky decomposition.
    with mutants.implementation(mutant) as implementation, pytest.raises((AssertionError, torch.linalg.LinAlgError)):
        whitened.non_finite_numbers_change_nothing(implementation, small(), OPTIONS, 0, bad)


@pytest.mark.parametrize("curvature", ["neurons", "both"])
@pytest.mark.parametrize(
    "mutant", [mutants.LoadsWithTheBaseClassOnly, mutants.ForgetsTheRefreshCounter, ForgetsTheFactors]
)
def test_law_5_fails_when_loading_loses_something(mutant: Any, curvature: str) -> None:
    case = (small(), OPTIONS, torch.bfloat16, 0)
    whitened.reload_continues_identically(SIMUOptimizer, *case, curvature=curvature)
    # Factors in bfloat16 are refused by the solver.
    with mutants.implementation(mutant) as implementation, pytest.raises((AssertionError, NotImplementedError)):
        whitened.reload_continues_identically(implementation, *case, curvature=curvature)
