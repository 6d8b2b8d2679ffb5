"""A fused step is the eager one in one pass, and is refused together with what its kernel does not do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.optimizer.fused.cases import named
from tests.rules.sources import ROOT
from torch_simu import SIMUOptimizer
from torch_simu.optimizer.groups import dtype_name
from torch_simu.optimizer.stepping import fused

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(module, folder, **environment):
    """Run a module in a process of its own: Triton decides when it is imported whether it interprets."""
    paths = os.pathsep.join(each for each in (str(ROOT), os.environ.get("PYTHONPATH", "")) if each)
    surroundings = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(folder), **environment}
    call = [sys.executable, "-m", f"tests.optimizer.fused.{module}", str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=surroundings)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
@pytest.mark.slow
def test_interpreted_steps_are_those_of_the_eager_step_and_mutants_are_not(tmp_path):
    found = json.loads(run("interpreted", tmp_path, TRITON_INTERPRET="1"))
    assert len(found) > len(named()) + 5
    assert not {name: said for name, said in found.items() if said}


@needs_triton
@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu_and_rounds_as_the_eager_step(tmp_path):
    assert len(run("compiled", tmp_path, TRITON_INTERPRET="0").splitlines()) == 3


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("name", named())
def test_compiled_steps_are_those_of_the_eager_step(gpu, name):
    if gpu.type != "cuda":
        pytest.skip("Triton compiles for a GPU")
    named()[name](str(gpu))


@pytest.fixture
def interpreting(monkeypatch):
    """As where Triton interprets: parameters may be on the processor."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused, "_kernel", lambda: None)


REFUSED = {
    "curvature neurons": ({"curvature": "neurons"}, "fused is True with curvature 'neurons', expected a diagonal one"),
    "curvature both": ({"curvature": "both"}, "fused is True with curvature 'both'"),
    "foreach": ({"foreach": True}, "fused is True with foreach=True, expected foreach=False"),
    "maximize": ({"maximize": True}, "fused is True with maximize=True"),
    "master weights": ({"master_weights": True}, "fused is True with master_weights=True"),
    "stochastic rounding": ({"stochastic_rounding": True}, "fused is True with stochastic_rounding=True"),
    "float64 state": ({"state_dtype": torch.float64}, "state_dtype torch.float64, expected torch.float32 or"),
}


def as_kept(options):
    """Options as groups hold them: dtypes by name."""
    return {key: dtype_name(value) if key == "state_dtype" else value for key, value in options.items()}


@pytest.mark.usefixtures("interpreting")
@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
class TestOptions:
    def test_what_the_kernel_does_not_do_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            SIMUOptimizer([nn.Parameter(torch.ones(2, 3))], fused=True, **options)
        with pytest.raises(ValueError, match=message):
            SIMUOptimizer([{"params": [nn.Parameter(torch.ones(2, 3))], "fused": True, **options}])

    def test_it_is_refused_in_a_saved_state_as_well_and_nothing_is_loaded(self, options, message):
        param = nn.Parameter(torch.ones(2, 3))
        optimizer = SIMUOptimizer([param], fused=True, lr=0.5)
        state = SIMUOptimizer([nn.Parameter(torch.ones(2, 3))], lr=0.1).state_dict()
        state["param_groups"][0] |= {"fused": True, **as_kept(options)}
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.5

    def test_it_is_refused_when_a_group_was_changed_since(self, options, message):
        param = nn.Parameter(torch.ones(2, 3))
        optimizer = SIMUOptimizer([param], fused=True)
        optimizer.param_groups[0] |= as_kept(options)
        param.grad = torch.ones(2, 3)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert torch.equal(param, torch.ones(2, 3))


@pytest.mark.usefixtures("interpreting")
@pytest.mark.parametrize(
    ("param", "group", "message"),
    [
        (torch.ones(2, dtype=torch.float64), {}, "parameter 0 is of torch.float64, expected float32, bfloat16 or"),
        (torch.ones(2, 3, 4), {"neurons": [[1]]}, r"parameter 0 of shape \(2, 3, 4\) has neurons along -1"),
        (
            torch.ones(2, 3),
            {"neurons": [[1]], "neuron_dim": (0, 1)},
            r"has neurons along \(0, 1\), expected those of a",
        ),
        (torch.ones(2, 3, 4).mT, {}, "parameter 0 of 3 dimensions is not contiguous"),
    ],
    ids=["float64", "experts", "two dimensions", "strides"],
)
def test_parameters_that_the_kernel_cannot_step_are_refused(param, group, message):
    with pytest.raises(ValueError, match=message):
        SIMUOptimizer([{"params": [nn.Parameter(param)], **group}], fused=True)


@pytest.mark.usefixtures("interpreting")
def test_of_what_does_not_train_nothing_is_asked():
    frozen = [{"params": [nn.Parameter(torch.ones(2, 3, 4).double())], "neurons": [[]]}]
    for params in (frozen, [("name", nn.Parameter(torch.ones(2, 3)))]):
        assert SIMUOptimizer(params, fused=True).param_groups[0]["fused"]


@pytest.mark.usefixtures("interpreting")
def test_a_state_with_master_weights_is_refused():
    param = nn.Parameter(torch.ones(2).bfloat16())
    optimizer = SIMUOptimizer([param], master_weights=True)
    param.grad = torch.ones(2).bfloat16()
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0] |= {"fused": True, "master_weights": False}
    with pytest.raises(ValueError, match="the state holds master weights"):
        optimizer.step()
    assert torch.equal(param, before)


def test_a_parameter_that_is_not_on_a_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"parameter 0 is on cpu, expected a CUDA device. Move it first"):
        SIMUOptimizer([nn.Parameter(torch.ones(2))], fused=True)


def test_that_triton_is_missing_is_said(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    fused._kernel.cache_clear()
    with pytest.raises(ImportError, match='triton is missing .* Run: pip install "triton>=3"'):
        SIMUOptimizer([nn.Parameter(torch.ones(2))], fused=True)


def test_states_of_before_the_option_load_and_are_not_fused():
    param = nn.Parameter(torch.ones(2))
    optimizer = SIMUOptimizer([param])
    state = optimizer.state_dict()
    assert state["param_groups"][0].pop("fused") is False
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["fused"] is False
