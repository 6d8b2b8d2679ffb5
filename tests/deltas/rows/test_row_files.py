"""Deltas of rows go into a file of their own kind, into float weights, or into codes with a report of what was lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.deltas.rows.nets import held, mlp, net_of, outputs, trained
from tests.deltas.rows.test_rows import with_rows
from tests.deltas.test_deltas import WIDTH, as_model, bits
from tests.faults.test_tampering import forged
from tests.strategies import normal, seeds
from torch_simu import merge_deltas
from torch_simu._files import load_tensors, save_tensors
from torch_simu.bitsandbytes.layers import eight_bit_codes, fingerprint
from torch_simu.deltas import attached_layers, load_deltas, save_deltas, write_back

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("kind", ["float", "8bit", "4bit"])
@pytest.mark.parametrize("layout", ["gated", "fused"])
def test_a_file_goes_on_the_same_base_only(layout: str, kind: str, tmp_path: Path) -> None:
    shape, path, x = mlp(layout, [3, 9], 0), tmp_path / "deltas.safetensors", normal(1, 4, 64)
    model = trained(shape, kind)
    save_deltas(model, path)
    other, fresh = net_of(mlp(layout, [3, 9], 5), kind), net_of(shape, kind)
    with pytest.raises(ValueError, match=r"The weight of layer '\w+' has sha256 .*, as it was under the delta"):
        load_deltas(other, path)
    assert not attached_layers(other)
    load_deltas(fresh, path)
    assert held(fresh) == held(model) and torch.equal(fresh(x), model(x))
    assert {name: layer.rows for name, layer in attached_layers(fresh).items()} == {
        name: layer.rows for name, layer in attached_layers(model).items()
    }
    with pytest.raises(ValueError, match=r"Layer '\w+' has a delta already"):
        load_deltas(fresh, path)


def test_a_reader_that_knows_columns_only_refuses_rows_and_columns_are_written_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "deltas.safetensors"
    save_deltas(trained(mlp("gated", [3, 9], 0), "8bit"), path)
    with pytest.raises(ValueError, match="has kind 'DeltasWithRows', version 2, expected a torch_simu file of kind 'D"):
        load_tensors(path, "Deltas")
    net = trained(mlp("gated", [3, 9], 0), "8bit")
    layer = net.down
    # What version 2 always was: sizes and hashes, and no word of rows.
    tensors = {"down.delta": layer.delta.detach(), "down.idx": layer.idx}
    save_tensors(path, "Deltas", tensors, {"num_neurons": {"down": 32}, "sha256": {"down": fingerprint(layer)}})
    fresh = net_of(mlp("gated", [3, 9], 0), "8bit")
    load_deltas(fresh, path)
    assert bits(fresh.down.delta) == bits(layer.delta) and not fresh.down.rows
    before = path.read_bytes()
    save_deltas(fresh, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: header.pop("rows"),
        lambda tensors, header: header.update(rows=None),
        lambda tensors, header: header.update(rows=["nowhere"]),
        lambda tensors, header: header.update(rows=[]),
        lambda tensors, header: header.update(rows=["down", "gate", "up"]),
        lambda tensors, header: header["num_neurons"].update(up=33),
        lambda tensors, header: tensors.update({"up.idx": torch.tensor([3, 32])}),
        lambda tensors, header: tensors.update({"up.delta": torch.zeros(64, 2)}),
        lambda tensors, header: tensors["gate.delta"].fill_(float("nan")),
        lambda tensors, header: tensors["gate.delta_bias"].fill_(float("inf")),
        lambda tensors, header: tensors.pop("gate.delta_bias"),
        lambda tensors, header: tensors.update({"gate.delta_bias": torch.zeros(3)}),
        lambda tensors, header: tensors.update({"down.delta_bias": torch.zeros(2)}),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_anything_is_attached(tmp_path: Path, change) -> None:
    shape, path = mlp("gated", [3, 9], 0), tmp_path / "deltas.safetensors"
    save_deltas(trained(shape, "8bit"), path)
    forged(path, "DeltasWithRows", change)
    fresh = net_of(shape, "8bit")
    with pytest.raises(ValueError, match="expected"):
        load_deltas(fresh, path)
    assert not attached_layers(fresh)


@given(st.sampled_from(["linear", "conv1d"]), outputs, st.sampled_from([torch.float32, torch.bfloat16]), seeds)
def test_merging_changes_the_rows_and_nothing_else(kind: str, rows: set[int], dtype: torch.dtype, seed: int) -> None:
    before = as_model(kind, seed, dtype)[0].weight.detach()
    model, *_ = with_rows(kind, rows, seed, dtype)
    old_bias = model[0].bias.detach().clone()
    value, bias = (delta.detach().clone() for delta in model[0].deltas().values())
    merge_deltas(model)
    after, old = (each if kind == "linear" else each.T for each in (model[0].weight.detach(), before))
    kept = [row for row in range(WIDTH) if row not in rows]
    assert torch.equal(after[kept], old[kept])
    assert torch.equal(after[sorted(rows)], (old[sorted(rows)].float() + value).to(dtype))
    assert torch.equal(model[0].bias[sorted(rows)], (old_bias[sorted(rows)].float() + bias).to(dtype))
    assert torch.equal(model[0].bias[kept], old_bias[kept])


@given(outputs, seeds, st.sampled_from([1e-2, 1.0, 100.0]))
def test_writing_back_changes_codes_of_the_rows_only_to_the_nearest(rows: set[int], seed: int, size: float) -> None:
    codes, scales = (each.clone() for each in eight_bit_codes(as_model("8bit", seed, torch.float32)[0]))
    model, _, bias = with_rows("8bit", rows, seed)
    old_bias = model[0].bias.detach().clone()
    chosen = sorted(rows)
    with torch.no_grad():
        model[0].delta.mul_(size)
    step = scales[:, None] / 127
    wanted = codes.float() * step
    wanted[chosen] += model[0].delta.detach()
    report = write_back(model)["0"]
    after, same_scales = eight_bit_codes(model[0])
    kept = [row for row in range(WIDTH) if row not in rows]
    assert torch.equal(after[kept], codes[kept]) and torch.equal(same_scales, scales)
    nearest = (wanted / step).clamp(-127, 127)
    assert ((after.float() - nearest).abs()[chosen] <= 0.5 + 1e-3).all()
    torch.testing.assert_close(model[0].bias.detach(), old_bias + bias)
    assert report.changed == pytest.approx((after[chosen] != codes[chosen]).float().mean().item())


def test_rows_of_a_layer_of_another_size_are_refused(tmp_path: Path) -> None:
    model, *_ = with_rows("linear", {1}, 0)
    save_deltas(model, tmp_path / "deltas")
    forged(tmp_path / "deltas", "DeltasWithRows", lambda tensors, header: header["num_neurons"].update({"0": 99}))
    with pytest.raises(ValueError, match=f"Layer '0' has {WIDTH} outputs, the rows of its delta are of 99"):
        load_deltas(as_model("linear", 0, torch.float32), tmp_path / "deltas")
