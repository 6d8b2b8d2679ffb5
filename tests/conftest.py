"""Profiles of the property tests, one thread per process, and the devices that tests run on."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

_SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]
settings.register_profile("dev", deadline=None, max_examples=15, suppress_health_check=_SLOW)
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, suppress_health_check=_SLOW)
settings.register_profile("nightly", deadline=None, max_examples=1000, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

torch.set_num_threads(1)

# It says at every forward pass in 8 bits that inputs are cast.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test; CUDA is skipped where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)
