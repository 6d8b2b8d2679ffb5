"""Balanced and whitened steps by StepGradients are those of the naive loop, in a loop of accelerate as in a Trainer."""

from __future__ import annotations

import accelerate
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from tests.unlearning.trainer.trainer_runs import FORGET, RETAIN, SEED, STEPS, make_model, make_refresh, make_selection
from tests.unlearning.trainer.whitened_runs import (
    OPTIONS,
    RETAIN_WEIGHT,
    TOLERANCE,
    largest_difference,
    num_hooks,
    whitened_loop,
)
from torch_simu import SIMUOptimizer
from torch_simu.hooks import NeuronHookError
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.objectives import Probability, Term
from torch_simu.unlearning.trainer.covariances import CovarianceRefresh
from torch_simu.unlearning.trainer.gradients import StepGradients


@pytest.mark.parametrize("rows", ["forget", "both"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("curvature", ["neurons", "both"])
def test_an_accelerate_loop_makes_the_steps_of_the_naive_loop(accumulation, curvature, rows):
    model, expected = make_model(), make_model()
    whitened_loop(expected, curvature, rows=rows)
    groups = make_selection(model).param_groups(model, "frozen")
    options = {**OPTIONS, "weight_decay": 0.1, "state_dtype": torch.float64}
    optimizer = SIMUOptimizer(groups, curvature=curvature, **options)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model, optimizer = accelerator.prepare(model, optimizer)
    with StepGradients(model, optimizer, balance=True, covariance_of=rows) as gradients:
        for step in range(STEPS):
            for _ in range(accumulation):
                with accelerator.accumulate(model):
                    # The whole batch in each part: the gradient is its own mean.
                    whole = [Batches(*of).batch(step) for of in ((FORGET, 4, 3 * SEED), (RETAIN, 4, 3 * SEED + 1))]
                    terms = Probability(RETAIN_WEIGHT).terms(model, *whole)
                    gradients.add(terms, backward=accelerator.backward, last=accelerator.sync_gradients)
                    optimizer.step()
                    optimizer.zero_grad()
    assert largest_difference(model, expected) < TOLERANCE
    assert num_hooks(model) == 0


class Scaled(Optimizer):
    """A wrapper with a GradScaler, as accelerate's is on a GPU."""

    def __init__(self, optimizer, scale):
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)


def test_the_scale_of_a_grad_scaler_changes_no_step():
    found = []
    # Unscaling by one leaves the gradient that was whitened; behind the others it is whitened anew.
    for scale in (2.0, 1024.0, 1.0):
        layer = nn.Linear(4, 3, bias=False)
        layer.weight.data.copy_(torch.arange(12).reshape(3, 4).sin())
        inner = SIMUOptimizer([{"params": [layer.weight], "neurons": [[0, 2]]}], curvature="both", lr=0.1)
        wrapped = Scaled(inner, scale)
        rows, retain = torch.linspace(-1, 1, 12).reshape(3, 4), 1e-3 * torch.linspace(1, 3, 8).reshape(2, 4)

        def terms(layer=layer, rows=rows, retain=retain):
            yield Term("forget", -1.0, layer(rows).square().sum())
            yield Term("retain", 2.0, layer(retain).square().sum())

        with StepGradients(layer, wrapped, balance=True) as gradients:
            gradients.add(terms(), backward=lambda loss, scaler=wrapped.scaler: scaler.scale(loss).backward())
        wrapped.scaler.unscale_(inner)
        inner.step()
        found.append((layer.weight.detach(), layer.weight.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][1], found[2][1])
    torch.testing.assert_close(found[2][0], found[0][0], rtol=1e-6, atol=1e-8)


def small(curvature="both"):
    layer = nn.Linear(4, 3)
    return layer, SIMUOptimizer([{"params": [layer.weight, layer.bias]}], curvature=curvature)


def test_the_refreshes_of_both_kinds_of_curvature_are_not_mixed_up():
    with pytest.raises(ValueError, match="'both', which retain rows do not refresh, expected 'gnb'. Leave the refresh"):
        make_refresh().after_step(*small(), 0)
    with pytest.raises(ValueError, match="The optimizer has curvature 'gnb', expected 'neurons' or 'both'"):
        CovarianceRefresh(*small("gnb"))
    with pytest.raises(TypeError, match="The optimizer is SGD, expected a SIMUOptimizer"):
        CovarianceRefresh(nn.Linear(1, 1), torch.optim.SGD(nn.Linear(1, 1).parameters()))


def test_weights_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"a weight of shape \(3, 4\) that is not in the model"):
        CovarianceRefresh(nn.Linear(4, 3), small()[1])


def test_a_refresh_says_when_nothing_was_differentiated_for_it():
    with CovarianceRefresh(*small()) as covariances, pytest.raises(NeuronHookError, match="was never called"):
        covariances.before_step()


def test_only_what_trains_is_hooked():
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    group = {"params": list(net.parameters()), "neurons": [[], [], [0, 2], None]}
    with CovarianceRefresh(net, SIMUOptimizer([group], curvature="neurons")) as covariances:
        with covariances.forget():
            net(torch.ones(1, 4)).sum().backward()
        assert {name: hooks.shape for name, hooks in covariances._hooks.items()} == {"1": (2, 2)}
        assert covariances.before_step() and not covariances.before_step()
