"""On a GPU hooks wait for nothing while they capture: shown on fake tensors, which autograd takes on a GPU only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.fake_cuda.waits import Waits, fake_cuda
from torch_simu.hooks.record import LayerRecord
from torch_simu.hooks.tap import InputTap


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
