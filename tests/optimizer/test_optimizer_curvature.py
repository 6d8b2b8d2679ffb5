"""Where the curvature comes from is explicit: Gauss-Newton, Hutchinson, or the squared gradient that SOUL takes."""

from __future__ import annotations

import itertools
import warnings
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.laws import make
from tests.strategies import generator, layers, normal, options, seeds
from torch_simu import SIMUOptimizer, gauss_newton_loss
from torch_simu.curvature import hutchinson_estimates
from torch_simu.optimizer import soul

pytestmark = pytest.mark.usefixtures("device")

BAD = float("nan")


def curvature(optimizer, param):
    return optimizer.state[param]["hessian"]


class PublishedSOUL:
    """SOUL's optimizer as published: curvature and momentum from the unlearning gradient, momentum twice a step."""

    def __init__(self, weight, lr, betas, rho, weight_decay, bs=5120):
        self.weight, self.lr, self.betas, self.rho, self.wd, self.bs = weight.clone(), lr, betas, rho, weight_decay, bs
        self.m, self.h = torch.zeros_like(weight), torch.zeros_like(weight)

    def step(self, grad):
        self.h = self.betas[1] * self.h + (1 - self.betas[1]) * grad * grad
        for _ in range(2):
            self.m = self.betas[0] * self.m + (1 - self.betas[0]) * grad
        self.weight = self.weight * (1 - self.lr * self.wd)
        ratio = (self.m.abs() / (self.rho * self.bs * self.h + 1e-15)).clamp(max=1)
        self.weight = self.weight - self.lr * self.m.sign() * ratio


@given(seeds, st.sampled_from([0.04, 1e-5]), st.sampled_from([0.0, 0.1]))
def test_the_soul_preset_takes_the_published_steps(seed, rho, weight_decay):
    param = nn.Parameter(normal(seed, 4, 3, dtype=torch.float64))
    choices = {"lr": 1e-2, "betas": (0.9, 0.95), "rho": rho, "weight_decay": weight_decay}
    oracle = PublishedSOUL(param.detach(), **choices)
    optimizer = SIMUOptimizer([param], state_dtype=torch.float64, **soul(**choices))
    for number in range(6):
        param.grad = normal(seed + 1 + number, 4, 3, dtype=torch.float64)
        oracle.step(param.grad)
        optimizer.step()
        assert not optimizer.hessian_due
    torch.testing.assert_close(param.detach(), oracle.weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(curvature(optimizer, param), oracle.h)


@given(seeds, options, st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_micro_batches_are_averaged_by_their_positions(seed, o, tokens):
    param = nn.Parameter(torch.zeros(3, 2))
    optimizer = SIMUOptimizer([param], betas=(o.beta1, o.beta2))
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for number, count in enumerate(tokens):
        param.grad = normal(seed + number, 3, 2)
        expected += count * (count * param.grad.double() ** 2)
        optimizer.update_hessian(count, last=number + 1 == len(tokens))
    torch.testing.assert_close(
        curvature(optimizer, param).double(), (1 - o.beta2) * expected / sum(tokens), rtol=1e-5, atol=1e-7
    )


@given(seeds, st.lists(st.sampled_from(["both", "first", "second"]), min_size=1, max_size=5), st.booleans())
def test_a_micro_batch_without_a_gradient_counts_as_zero(seed, routed, capturable):
    """As of experts that no token of a micro-batch was sent to."""
    results = []
    for given_as in ("none", "zeros"):
        params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
        optimizer = SIMUOptimizer(params, capturable=capturable)
        for number, which in enumerate(routed):
            for place, (param, name) in enumerate(zip(params, ("first", "second"), strict=True)):
                grad = normal(seed + 2 * number + place, 2)
                missing = None if given_as == "none" else torch.zeros(2)
                param.grad = grad if which in ("both", name) else missing
            optimizer.update_hessian(3 + number, last=number + 1 == len(routed))
        results.append([optimizer.state[param].get("hessian", torch.zeros(2)) for param in params])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_micro_batch_that_is_not_finite_has_no_weight(capturable):
    param, twin = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer, other = (SIMUOptimizer([each], capturable=capturable) for each in (param, twin))
    for number, grad in enumerate(([1.0, 2.0], [BAD, 1.0], [3.0, 4.0])):
        param.grad = torch.tensor(grad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.update_hessian(5, last=number == 2)
    for number, grad in enumerate(([1.0, 2.0], [3.0, 4.0])):
        twin.grad = torch.tensor(grad)
        other.update_hessian(5, last=number == 1)
    assert torch.equal(curvature(optimizer, param), curvature(other, twin))
    assert optimizer.diagnostics()["skipped_steps"] == 1


def test_accumulation_varies_less_than_one_batch():
    torch.manual_seed(0)
    inputs, weight = torch.randn(32, 3), nn.Parameter(torch.randn(4, 3))
    labels = torch.zeros(32, dtype=torch.long)

    def spread(parts):
        estimates = []
        for _ in range(200):
            optimizer = SIMUOptimizer([weight], betas=(0.0, 0.0))
            for number, part in enumerate(inputs.chunk(parts)):
                weight.grad = None
                loss, num_tokens = gauss_newton_loss(part @ weight.T, labels[: len(part)])
                loss.backward()
                optimizer.update_hessian(num_tokens, last=number + 1 == parts)
            estimates.append(curvature(optimizer, weight))
        return torch.stack(estimates).std(0).mean()

    assert spread(8) < 0.6 * spread(1)


def cubic(weights):
    """A loss whose second derivatives are not constant and couple the weights."""
    flat = torch.cat([weight.flatten() for weight in weights])
    return (flat**3).sum() / 3 + (flat.sum()) ** 2


@given(seeds, st.integers(1, 3))
def test_hutchinson_is_unbiased(seed, size):
    weight = normal(seed, size, dtype=torch.float64).requires_grad_()
    exact = torch.autograd.functional.hessian(lambda flat: cubic([flat]), weight).diagonal()
    total = torch.zeros(size, dtype=torch.float64)
    # Every outcome of the signs, instead of many draws.
    for signs in itertools.product((0, 1), repeat=size):
        with mock.patch("torch_simu.curvature.torch.randint", return_value=torch.tensor(signs)):
            [[estimate]] = hutchinson_estimates(cubic([weight]), [weight], list)
        total += estimate / 2**size
    torch.testing.assert_close(total, exact)


@given(layers(), options, seeds, st.integers(1, 3))
def test_hutchinson_probes_the_selected_entries_only(layer, o, seed, num_probes):
    param, optimizer = make(SIMUOptimizer, layer, o, torch.float64, curvature="hutchinson", state_dtype=torch.float64)
    param.grad = normal(seed, *param.shape, dtype=torch.float64)
    kept = param.grad.clone()
    # The diagonal is 2 * param; the coupling is between selected and unselected entries alone.
    mask = layer.mask()
    loss = (param**3).sum() / 3 + param[mask].sum() * param[~mask].sum()
    optimizer.update_hutchinson(loss, generator=generator(seed), num_probes=num_probes)
    expected = (1 - o.beta2) * 2 * param.detach()
    expected = expected.index_select(layer.dim, torch.tensor(layer.neurons, dtype=torch.long))
    torch.testing.assert_close(curvature(optimizer, param), expected)
    assert torch.equal(param.grad, kept)


def test_hutchinson_is_due_and_reproducible_and_steps_go_on():
    def run():
        param = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        optimizer = SIMUOptimizer([param], lr=0.1, curvature="hutchinson", hessian_interval=2)
        draw, due = generator(0), []
        for _ in range(5):
            cubic([param]).backward()
            optimizer.step()
            optimizer.zero_grad()
            due.append(optimizer.hessian_due)
            if optimizer.hessian_due:
                optimizer.update_hutchinson(cubic([param]), generator=draw)
        return param.detach(), due

    first, due = run()
    assert due == [True, False, True, False, True]
    assert torch.equal(first, run()[0])


def test_a_linear_loss_has_no_curvature():
    param = nn.Parameter(torch.ones(2))
    optimizer = SIMUOptimizer([param], curvature="hutchinson")
    optimizer.update_hutchinson(param.sum())
    assert curvature(optimizer, param).tolist() == [0.0, 0.0]


class Once(torch.autograd.Function):
    """An operation without a second derivative."""

    @staticmethod
    def forward(ctx, value):
        return value * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


def test_what_cannot_be_refreshed_is_said():
    param = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="update_hessian was called, and no group has curvature='gnb'"):
        SIMUOptimizer([param], **soul()).update_hessian(1)
    with pytest.raises(ValueError, match="update_hutchinson was called, and no group has curvature='hutchinson'"):
        SIMUOptimizer([param]).update_hutchinson(param.sum())
    with pytest.raises(ValueError, match="curvature is 'fisher'"):
        SIMUOptimizer([param], curvature="fisher")
    optimizer = SIMUOptimizer([param], curvature="hutchinson")
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice .* attn_implementation"):
        optimizer.update_hutchinson((Once.apply(param) ** 2).sum())
    with pytest.raises(ValueError, match="num_probes is 0"):
        optimizer.update_hutchinson((param**2).sum(), num_probes=0)
