"""On a GPU hooks wait for nothing while they capture: shown on fake tensors, which autograd takes on a GPU only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.fake_cuda.waits import Waits, fake_cuda
from tests.strategies import normal
from torch_simu.hooks.record import SUMS, LayerRecord
from torch_simu.hooks.tap import InputTap, positions


@pytest.mark.parametrize("reduce", ["attribution", "act", "grad", "sq", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_backward_records_neither_reads_the_device_nor_copies_between_devices(reduce, dtype):
    record = LayerRecord("2", reduce, torch.float32)
    tap = InputTap(nn.Linear(6, 2), record, 0)
    with fake_cuda() as fake, torch.no_grad():
        activation, gradient = (fake(torch.zeros(3, 5, 6, dtype=dtype)) for _ in range(2))
        with Waits() as waits:
            for number in range(2):
                record.add(number, *(tap.positions(each, None) for each in (activation, gradient)))
            assert record.read().device.type == "cuda"
        assert waits.counts == {}


@pytest.mark.parametrize("reduce", SUMS)
@pytest.mark.parametrize("neurons", [None, [0, 2, 5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_sums_wait_for_nothing_after_the_neurons_were_copied_once(reduce, neurons, dtype):
    chosen = torch.tensor(neurons) if neurons and reduce == "covariance" else None
    record = LayerRecord("2", reduce, torch.float32, chosen)
    tap = InputTap(nn.Linear(6, 2), record, 0)
    with fake_cuda() as fake, torch.no_grad():
        activation, gradient = (fake(torch.zeros(3, 5, 6, dtype=dtype)) for _ in range(2))
        mask = fake(torch.zeros(3, 5, dtype=torch.bool))

        def once(number):
            record.add(number, *(tap.positions(each, mask) for each in (activation, gradient)))

        once(0)
        with Waits() as waits:
            once(1)
            assert record.read().device.type == "cuda"
        assert waits.counts == {}


@pytest.mark.parametrize("reduce", SUMS)
def test_a_sum_over_zeros_for_masked_positions_is_that_without_them(reduce):
    activation, gradient = normal(0, 3, 5, 6), normal(1, 3, 5, 6)
    mask = normal(2, 3, 5) > 0
    activation[~mask], gradient[~mask] = torch.nan, torch.inf
    found = []
    for pick in (True, False):
        record = LayerRecord("2", reduce, torch.float64)
        record.add(0, *(positions(each, -1, mask, pick=pick) for each in (activation, gradient)))
        found.append((record.read(), record.num_positions))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=0)
    assert found[0][1] == found[1][1]


def test_neurons_are_looked_for_once_until_they_change():
    record = LayerRecord("2", "covariance", torch.float32, torch.tensor([0, 2, 5, 6]))
    neurons = torch.tensor([2, 6])
    found = record.places(neurons)
    assert found.tolist() == [1, 3]
    assert record.places(neurons) is found
    neurons[0] = 1
    assert record.places(neurons) is None
    assert record.places(torch.tensor([5])).tolist() == [2]
    assert LayerRecord("2", "covariance", torch.float32).places(neurons) is neurons
