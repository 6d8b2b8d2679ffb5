"""Deltas go into float weights, into a file beside the same base, or into codes with a report of what was lost."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.deltas.test_deltas import KINDS, SIZE, WIDTH, as_model, float_linear, neurons
from tests.strategies import normal, seeds
from torch_simu import NeuronSelection, attach_deltas, merge_deltas
from torch_simu.bitsandbytes.layers import eight_bit_codes
from torch_simu.deltas import attached_layers, load_deltas, save_deltas, write_back


@given(st.sampled_from(["linear", "conv1d"]), neurons, st.sampled_from([torch.float32, torch.bfloat16]), seeds)
def test_merging_folds_the_deltas_in_and_nothing_else(
    kind: str, chosen: set[int], dtype: torch.dtype, seed: int
) -> None:
    model = as_model(kind, seed, dtype)
    before, plain = model[0].weight.clone(), type(model[0])
    delta = attach_deltas(model, NeuronSelection({"0": chosen}, {"0": SIZE}))["0"]
    value = normal(seed + 2, *delta.shape)
    with torch.no_grad():
        delta.copy_(value)
    expected = model(normal(seed + 3, 4, SIZE, dtype=dtype))
    merge_deltas(model)
    assert type(model[0]) is plain and model[0].weight.requires_grad
    kept = torch.ones(SIZE, dtype=torch.bool)
    kept[sorted(chosen)] = False
    after, old = (each if kind == "linear" else each.T for each in (model[0].weight, before))
    assert torch.equal(after[:, kept], old[:, kept])
    assert torch.equal(after[:, ~kept], (old[:, ~kept].float() + value).to(dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(model(normal(seed + 3, 4, SIZE, dtype=dtype)), expected, rtol=tolerance, atol=tolerance)


def test_deltas_on_codes_are_not_merged() -> None:
    for kind in ("8bit", "4bit"):
        model = nn.Sequential(float_linear(0), nn.Linear(WIDTH, SIZE), KINDS[kind](0))
        attach_deltas(model, NeuronSelection({"0": [1], "2": [1]}, {"0": SIZE, "2": SIZE}))
        with pytest.raises(ValueError, match=r"The weight of layer '2' holds torch\.u?int8 codes, expected a floating"):
            merge_deltas(model)
        assert list(attached_layers(model)) == ["0", "2"]


def test_a_file_of_deltas_goes_on_the_same_base_only(tmp_path) -> None:
    path = tmp_path / "deltas.safetensors"
    for kind in KINDS:
        model, other = as_model(kind, 0, torch.float32), as_model(kind, 5, torch.float32)
        fresh = copy.deepcopy(model)
        delta = attach_deltas(model, NeuronSelection({"0": [3, 9]}, {"0": SIZE}))["0"]
        with torch.no_grad():
            delta.copy_(normal(1, *delta.shape))
        save_deltas(model, path)
        with pytest.raises(ValueError, match=r"The weight of layer '0' has sha256 .*, as it was under the delta"):
            load_deltas(other, path)
        assert not attached_layers(other)
        load_deltas(fresh, path)
        x = normal(2, 4, SIZE)
        assert torch.equal(fresh(x), model(x))
        with pytest.raises(ValueError, match="Layer '0' has a delta already"):
            load_deltas(fresh, path)
    with pytest.raises(KeyError, match="Layer '0' is not in the model"):
        load_deltas(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="No layer of the model has a delta"):
        save_deltas(other, path)


@given(neurons, seeds, st.sampled_from([1e-4, 1e-2, 1.0, 100.0]))
def test_writing_back_changes_selected_codes_only_and_says_what_was_lost(
    chosen: set[int], seed: int, size: float
) -> None:
    model = as_model("8bit", seed, torch.float32)
    codes, scales = (each.clone() for each in eight_bit_codes(model[0]))
    delta = attach_deltas(model, NeuronSelection({"0": chosen}, {"0": SIZE}))["0"]
    with torch.no_grad():
        delta.copy_(size * normal(seed + 1, *delta.shape))
    report = write_back(model)["0"]
    assert type(model[0]).__name__ == "Linear8bitLt"
    after, same_scales = eight_bit_codes(model[0])
    columns = sorted(chosen)
    kept = torch.ones(SIZE, dtype=torch.bool)
    kept[columns] = False
    assert torch.equal(after[:, kept], codes[:, kept]) and torch.equal(same_scales, scales)
    step = scales[:, None] / 127
    wanted = codes[:, columns].float() * step + delta.detach()
    for row in range(WIDTH):
        # The nearest of all codes.
        levels = torch.arange(-127, 128) * step[row]
        nearest = (levels[None] - wanted[row][:, None]).abs().min(dim=1).values
        found = (after[row, columns].float() * step[row] - wanted[row]).abs()
        torch.testing.assert_close(found, nearest, rtol=1e-3, atol=1e-5 * size)
    assert report.changed == pytest.approx((after[:, columns] != codes[:, columns]).float().mean().item())
    assert (report.clamped > 0.5) == (size == 100.0)
    if size == 1e-4:
        assert report.realized < 0.5
    if size == 1.0:
        assert report.realized > 0.5


def test_float_layers_are_not_written_back() -> None:
    model = nn.Sequential(float_linear(0))
    attach_deltas(model, NeuronSelection({"0": [1]}, {"0": SIZE}))
    with pytest.raises(ValueError, match="The weight of layer '0' holds torch.float32, expected 8-bit codes. Merge"):
        write_back(model)
    assert list(attached_layers(model)) == ["0"]
