"""What a test makes is on the device, what the package makes is not, and an emulated device refuses a mixture."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from tests.devices.placing import Placed, here
from tests.rules.sources import ROOT
from tests.strategies import normal
from torch_simu import NeuronSelection

META = torch.device("meta")


def test_tensors_and_layers_of_a_test_are_on_the_device_and_those_of_the_package_are_not():
    with Placed(META):
        assert here() == META
        made = (torch.zeros(2), torch.tensor([1]), normal(0, 2), nn.Linear(2, 3).weight)
        assert {each.device.type for each in made} == {"meta"}
        assert NeuronSelection({"0": [1]}, {"0": 4}).mask("0").device.type == "cpu"
        assert torch.zeros(2, device="cpu").device.type == "cpu"
    assert here().type == "cpu" and torch.zeros(2).device.type == "cpu"


def test_draws_are_those_of_the_processor():
    expected = normal(3, 2, 3)
    with Placed(torch.device("cpu", 0)):
        assert torch.equal(normal(3, 2, 3), expected)


EMULATED = """
import torch
from tests.devices.emulated import register
from torch_simu import SIMUOptimizer
library = register()
weight = torch.nn.Parameter(torch.ones(2, 3).to("emulated"))
weight.mul(torch.tensor([1.0, 2.0, 3.0], device="emulated")).sum().backward()
assert weight.grad.tolist() == [[1.0, 2.0, 3.0]] * 2
optimizer = SIMUOptimizer([{"params": [weight], "neurons": [[0, 2]]}], lr=0.5)
optimizer.step()
assert weight.tolist() == [[0.5, 1.0, 0.5]] * 2
assert optimizer.state[weight]["exp_avg"].device.type == "emulated"
try:
    weight + torch.ones(3)
except RuntimeError as error:
    assert "same device" in str(error)
else:
    raise AssertionError("a mixture was taken")
"""


def test_an_emulated_device_computes_steps_and_refuses_a_mixture():
    # A backend is there for the whole life of a process.
    subprocess.run([sys.executable, "-c", EMULATED], cwd=ROOT, check=True)
