"""Profiles of the property tests, one thread per process, and the devices that tests run on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from tests.devices.placing import Placed

_SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]
settings.register_profile("dev", deadline=None, max_examples=15, suppress_health_check=_SLOW)
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, suppress_health_check=_SLOW)
settings.register_profile("nightly", deadline=None, max_examples=1000, suppress_health_check=_SLOW)
# Each operation of a small example starts a kernel, and time on a GPU is short.
_BRIEF = {"max_examples": 5, "derandomize": True, "phases": [Phase.explicit, Phase.generate]}
settings.register_profile("gpu", deadline=None, suppress_health_check=_SLOW, **_BRIEF)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

torch.set_num_threads(1)

# It says at every forward pass in 8 bits that inputs are cast.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

_LIBRARY = pytest.StashKey[torch.library.Library]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="run on this device what is marked gpu, which takes cuda where there is one")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device under test, where the test makes its tensors; skipped where there is no GPU."""
    if request.param == "cpu":
        yield torch.device("cpu")
        return
    yield from place(chosen_device(request.config))


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> torch.device:
    """The device of a test that has no other."""
    return chosen_device(request.config)


@pytest.fixture
def placed(gpu: torch.device) -> Iterator[torch.device]:
    """The device of a test that has no other, where the test makes its tensors."""
    yield from place(gpu)


def place(device: torch.device) -> Iterator[torch.device]:
    """Let a test make its tensors on a device."""
    # What TF32 rounds is no error of the package.
    with Placed(device), torch.backends.cudnn.flags(allow_tf32=False):
        yield device


def chosen_device(config: pytest.Config) -> torch.device:
    """The device that was asked for, or CUDA; skips where there is none."""
    name = config.getoption("--device")
    if name is None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(name or "cuda")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "emulated":
        from tests.devices import emulated

        config.stash[_LIBRARY] = emulated.register()
