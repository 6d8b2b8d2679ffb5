"""Damping: relative to the mean of a diagonal without its largest fiftieth, so that no single neuron sets it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import trimmed_mean
from torch_simu import whitening
from torch_simu.whitening import damped_cholesky, undamped, whiten

MASSIVE = 1e3
"""How much more active one neuron is than the others, as in the twelfth layer of SmolLM2."""


def covariance_of(size: int, seed: int, *, massive: bool = False) -> Tensor:
    """The covariance of a few positions, of which one neuron may be far more active at the first."""
    activations = torch.randn(2 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if massive:
        activations[:, 0] = 0.0
        activations[0, 0] = MASSIVE * size**0.5
    return activations.T @ activations / len(activations)


@given(size=st.sampled_from([1, 2, 49, 50, 51, 99, 100, 130]), seed=st.integers(0, 2**16), massive=st.booleans())
def test_what_is_added_is_a_share_of_the_trimmed_mean_and_can_be_taken_off(size: int, seed: int, massive: bool) -> None:
    covariance = covariance_of(size, seed, massive=massive)
    factor = damped_cholesky(covariance, damping=0.1)
    added = 0.1 * trimmed_mean(covariance.diagonal())
    torch.testing.assert_close(factor @ factor.T, covariance + added * torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(undamped(factor, damping=0.1), covariance)


def check_the_others(size: int, seed: int) -> None:
    """One massive neuron, which is active where no other is, leaves the step of all others as it was."""
    covariance = covariance_of(size, seed)
    covariance[0, 1:], covariance[1:, 0] = 0.0, 0.0
    massive = covariance.clone()
    # It is the largest entry in both, so that the others' mean is the same.
    covariance[0, 0], massive[0, 0] = covariance.diagonal().max() + 1, MASSIVE**2
    gradient = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    plain, beside = (whiten(gradient, damped_cholesky(each, damping=0.1)) for each in (covariance, massive))
    torch.testing.assert_close(beside[:, 1:], plain[:, 1:])


@given(size=st.integers(50, 99), seed=st.integers(0, 2**16))
def test_a_massive_neuron_leaves_the_step_of_the_others_as_it_was(size: int, seed: int) -> None:
    check_the_others(size, seed)


def test_a_mean_of_all_neurons_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "damping_scale", Tensor.mean)
    with pytest.raises(AssertionError):
        check_the_others(60, 0)
