"""A refresh estimates the curvature on labels sampled from the model, however its batch is split or wrapped."""

from __future__ import annotations

import pytest
import torch

from tests.unlearning.trainer.trainer_runs import OPTIONS, RETAIN, SEED, make_model, make_refresh, make_selection
from torch_simu import SIMUOptimizer
from torch_simu.unlearning.data.examples import Example, collate
from torch_simu.unlearning.refresh import find_simu_optimizer
from torch_simu.unlearning.trainer.refresh import CurvatureRefresh


def curvature(refresh, step=0):
    """The curvature after one step of gradients that do not matter, and one refresh."""
    model = make_model()
    optimizer = SIMUOptimizer(make_selection(model).param_groups(model, "frozen"), **{**OPTIONS, "lr": 0.0})
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert refresh.after_step(model, optimizer, step) and not optimizer.hessian_due
    return torch.cat([entry["hessian"].flatten() for entry in optimizer.state.values()])


def test_the_labels_of_a_refresh_are_sampled_from_the_model():
    expected = curvature(make_refresh())
    # Other labels at the same positions: they only say which positions count.
    relabeled = [Example(row.input_ids, tuple(min(label, 5) for label in row.labels)) for row in RETAIN]
    assert torch.equal(curvature(make_refresh(relabeled)), expected)
    # Other draws, by seed or step; the batch has all rows, so that nothing else differs.
    draws = [curvature(make_refresh(batch_size=9, seed=seed), step=step) for seed, step in ((0, 0), (1, 0), (0, 1))]
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_a_refresh_in_micro_batches_is_the_same(micro_batch_size):
    found = curvature(make_refresh(micro_batch_size=micro_batch_size))
    torch.testing.assert_close(found, curvature(make_refresh()), rtol=1e-9, atol=0)


def test_a_refresh_leaves_gradients_and_the_shared_randomness_as_they_were():
    model = make_model()
    optimizer = SIMUOptimizer(make_selection(model).param_groups(model, "frozen"), **OPTIONS)
    model(**collate(RETAIN[:2], 0)).loss.backward()
    optimizer.step()
    before = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    copies, state = {name: grad.clone() for name, grad in before.items()}, torch.get_rng_state()
    assert make_refresh().after_step(model, optimizer, 0)
    for name, param in model.named_parameters():
        assert param.grad is before.get(name) and (param.grad is None or torch.equal(param.grad, copies[name]))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_scale_of_a_grad_scaler_is_taken_out_of_the_curvature():
    class Wrapped(torch.optim.SGD):
        def __init__(self, optimizer):
            self.optimizer, self.scaler = optimizer, torch.amp.GradScaler("cpu", init_scale=1024.0)

    class Scaled(CurvatureRefresh):
        def after_step(self, model, optimizer, step):
            wrapped = Wrapped(optimizer)
            done = super().after_step(model, wrapped, step)
            # Nothing was unscaled through it, so the next step may do so.
            assert not wrapped.scaler._per_optimizer_states
            return done

    found = curvature(Scaled(RETAIN, batch_size=4, seed=SEED))
    assert torch.equal(found, curvature(make_refresh()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_refresh([]), "The retain set is empty, expected at least one example"),
        (lambda: make_refresh([Example((5, 6), (5, -100))]), "Retain example 0 has no scored token"),
        (lambda: make_refresh(batch_size=0), "batch_size is 0"),
        (lambda: make_refresh(micro_batch_size=0), "micro_batch_size is 0"),
        (lambda: find_simu_optimizer(None), "The optimizer is NoneType, expected a SIMUOptimizer"),
    ],
)
def test_wrong_arguments_of_a_refresh_are_refused(make, message):
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        make()
