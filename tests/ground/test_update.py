"""The clipped step and the rounding are pure functions that do what their formula says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import normal, seeds
from torch_simu.update import clipped_step_, round_stochastically

pytestmark = pytest.mark.usefixtures("device")

half_dtypes = st.sampled_from([torch.bfloat16, torch.float16])


@given(seeds, half_dtypes, st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
def test_stochastic_rounding_gives_one_of_the_two_neighbors(seed, dtype, size):
    value = size * normal(seed, 200)
    rounded = round_stochastically(value, dtype, torch.Generator().manual_seed(seed))
    nearest = value.to(dtype)
    spacing = torch.finfo(dtype).eps * value.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert rounded.dtype == dtype
    assert (rounded.float() - value).abs().le(spacing * 1.01).all()
    assert torch.equal(rounded[nearest.float() == value], nearest[nearest.float() == value])


@given(seeds, half_dtypes)
def test_stochastic_rounding_keeps_the_expected_value(seed, dtype):
    value = torch.full((20_000,), 1.0) + torch.finfo(dtype).eps * 0.3
    rounded = round_stochastically(value, dtype, torch.Generator().manual_seed(seed)).float()
    share = ((rounded - 1.0) / torch.finfo(dtype).eps).mean().item()
    assert share == pytest.approx(0.3, abs=0.03)


def test_stochastic_rounding_refuses_what_is_no_half_precision():
    with pytest.raises(ValueError, match="dtype is torch.int8"):
        round_stochastically(torch.ones(1), torch.int8)


@pytest.mark.parametrize("name", ["grad", "exp_avg", "hessian"])
def test_a_tensor_of_another_shape_is_refused_by_name(name):
    tensors = {"grad": torch.ones(2), "exp_avg": torch.ones(2), "hessian": torch.ones(2)}
    tensors[name] = torch.ones(3)
    with pytest.raises(ValueError, match=rf"{name} has shape \(3,\), expected \(2,\) as weight"):
        clipped_step_(torch.ones(2), **tensors, lr=0.1, beta1=0.9, rho=1.0)
