"""What hooks do with tensors on a device waits for nothing: shown on fake tensors, without a GPU.

Only the passes themselves are left out, since torch built for processors has no autograd engine for the device.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from tests.fake_cuda.waits import Waits, fake_cuda
from torch_simu.hooks.record import LayerRecord
from torch_simu.hooks.tap import InputTap


@pytest.mark.parametrize("reduce", ["attribution", "act", "grad", "sq", None])
def test_a_hook_reads_no_scalar_and_never_leaves_the_device(reduce: str | None) -> None:
    record = LayerRecord("mlp", reduce, torch.float32)
    tap = InputTap(nn.Linear(6, 4), record, 0)
    with fake_cuda() as fake, Waits() as waits:
        activation, gradient = (fake(torch.ones(2, 3, 6, dtype=torch.bfloat16)) for _ in range(2))
        for number in (1, 2):
            record.add(number, *(tap.positions(tensor, None) for tensor in (activation, gradient)))
        assert record.read().device.type == "cuda"
    assert waits.counts == Counter()
