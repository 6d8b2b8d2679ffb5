"""A step takes what a balance whitened, and whitens anew wherever the gradient or the curvature is another one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.optimizer.whitened.whitened import Net
from tests.strategies import Layer, float_dtypes, layers, normal, seeds
from torch_simu import NeuronSelection, SIMUOptimizer
from torch_simu.optimizer import GradientBalance, covariance_hooks
from torch_simu.optimizer.stepping import trust
from torch_simu.optimizer.stepping.directions import Directions, row_hashes


class Balanced:
    """A layer whose forget and retain gradients were combined: the next thing is a step."""

    def __init__(self, layer: Layer, seed: int, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        self.layer, self.seed, self.dtype = layer, seed, dtype
        self.net = Net(layer, dtype)
        groups = NeuronSelection({"down": list(layer.neurons)}, {"down": layer.num_neurons}).param_groups(self.net)
        self.optimizer = SIMUOptimizer(groups, lr=0.1, **{"curvature": "both", **options})
        self.balance = GradientBalance(self.optimizer)
        with self.balance.forget():
            self.backward(1)
        self.refresh(2)
        self.net.zero_grad()
        self.backward(3)
        self.balance.combine_(retain_weight=2.0)

    @property
    def weight(self) -> nn.Parameter:
        """The weight that trains."""
        return self.net.down.weight

    def backward(self, number: int) -> None:
        """Add a gradient of ten positions."""
        x, factor = normal(self.seed + number, 10, self.layer.num_neurons), normal(self.seed, 10, self.layer.width)
        (self.net(x.to(self.dtype)) * factor.to(self.dtype)).sum().backward()

    def refresh(self, number: int) -> None:
        """Refresh the curvature, and leave the gradient as it is."""
        kept = self.weight.grad
        with covariance_hooks(self.net, self.optimizer) as hooks:
            self.backward(number)
        self.weight.grad = kept
        self.optimizer.update_curvature(hooks)

    def stepped(self) -> Tensor:
        """The weight behind a step."""
        self.optimizer.step()
        return self.weight.detach()

    def stepped_elsewhere(self) -> Tensor:
        """The weight behind the same step of a copy, which has the gradient and the state and nothing else."""
        weight, optimizer = copy.deepcopy((self.weight, self.optimizer))
        assert self.weight.grad is not None
        weight.grad = self.weight.grad.clone()
        optimizer.step()
        return weight.detach()


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each gradient that a step whitens."""
    calls: list[int] = []
    whitened = trust.whitened
    monkeypatch.setattr(trust, "whitened", lambda *args: (calls.append(1), whitened(*args))[1])
    return calls


LAYER = Layer(num_neurons=5, width=4, dim=-1, contiguous=True, neurons=(0, 2, 3), seed=7)
chosen_layers = layers().filter(lambda layer: bool(layer.neurons))


@given(chosen_layers, seeds, st.sampled_from(["neurons", "both"]), st.booleans())
def test_a_step_behind_a_balance_is_that_of_the_gradient_it_left(
    layer: Layer, seed: int, curvature: str, maximize: bool
) -> None:
    run = Balanced(layer, seed, curvature=curvature, maximize=maximize, state_dtype=torch.float64)
    expected = run.stepped_elsewhere()
    torch.testing.assert_close(run.stepped(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("neurons", [(0, 2, 3), (0, 1, 2, 3, 4)])
def test_a_balance_and_its_step_whiten_two_gradients_and_not_three(solved: list[int], neurons: tuple[int, ...]) -> None:
    run = Balanced(dataclasses.replace(LAYER, neurons=neurons), seed=0)
    run.stepped()
    assert not solved
    run.stepped()
    assert len(solved) == 1


@given(chosen_layers, seeds, float_dtypes.filter(lambda dtype: dtype.itemsize == 2))
def test_a_gradient_in_half_precision_is_whitened_as_it_is(layer: Layer, seed: int, dtype: torch.dtype) -> None:
    run = Balanced(layer, seed, dtype)
    expected = run.stepped_elsewhere()
    assert torch.equal(run.stepped(), expected)


def _clipped(run: Balanced) -> None:
    assert run.weight.grad is not None
    nn.utils.clip_grad_value_([run.weight], float(run.weight.grad.abs().median()))


def _written_past_torch(run: Balanced) -> None:
    assert run.weight.grad is not None
    run.weight.grad.data[0].neg_()


def _rows_swapped(run: Balanced) -> None:
    assert run.weight.grad is not None
    run.weight.grad.data.copy_(run.weight.grad.flip(0))


def _columns_swapped(run: Balanced) -> None:
    assert run.weight.grad is not None
    run.weight.grad.data.copy_(run.weight.grad.clone()[:, [3, 1, 2, 0, 4]])


def _zeroed(run: Balanced) -> None:
    run.optimizer.zero_grad()
    run.backward(4)


def _zeroed_in_place(run: Balanced) -> None:
    run.optimizer.zero_grad(set_to_none=False)
    run.backward(4)


def _reloaded(run: Balanced) -> None:
    other = Balanced(run.layer, run.seed + 100, run.dtype)
    run.optimizer.load_state_dict(other.optimizer.state_dict())


def _factor_changed(name: str) -> Callable[[Balanced], None]:
    def change(run: Balanced) -> None:
        run.optimizer.state[run.weight][name][0, 0] *= 2

    return change


def _upwards(run: Balanced) -> None:
    run.optimizer.param_groups[0]["maximize"] = True


def _other_neurons(run: Balanced) -> None:
    run.optimizer.change_selection(NeuronSelection({"down": [1, 3, 4]}, {"down": 5}), run.net)
    run.refresh(5)


CHANGES: dict[str, Callable[[Balanced], None]] = {
    "clipping": _clipped,
    "a write through .data": _written_past_torch,
    "rows swapped": _rows_swapped,
    "columns swapped": _columns_swapped,
    "another backward": lambda run: run.backward(4),
    "zero_grad": _zeroed,
    "zero_grad in place": _zeroed_in_place,
    "a refresh": lambda run: run.refresh(4),
    "load_state_dict": _reloaded,
    "one factor in place": _factor_changed("neuron_factor"),
    "the other factor in place": _factor_changed("output_factor"),
    "maximize": _upwards,
    "change_selection": _other_neurons,
}


def _is_whitened_anew(change: Callable[[Balanced], None]) -> None:
    run = Balanced(LAYER, seed=0, state_dtype=torch.float64)
    change(run)
    expected = run.stepped_elsewhere()
    assert torch.equal(run.stepped(), expected)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changed_between_a_balance_and_its_step_is_whitened_anew(change: Callable[[Balanced], None]) -> None:
    _is_whitened_anew(change)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_direction_that_is_taken_unseen_would_be_seen(
    change: Callable[[Balanced], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Directions, "take", lambda self, group, entry, state: getattr(self._kept.get(entry.param), "direction", None)
    )
    with pytest.raises(AssertionError):
        _is_whitened_anew(change)


@given(
    seed=seeds, rows=st.integers(1, 6), columns=st.integers(1, 6), dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_another_matrix_has_another_hash_also_with_the_same_numbers(
    seed: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    grad = normal(seed, rows, columns).to(dtype)
    changed = {"negated": -grad, "a sign": grad.clone(), "in other places": grad.flip(1), "a last bit": grad.clone()}
    changed["a sign"][-1, -1] *= -1
    changed["a last bit"][0, 0] = torch.nextafter(grad[0, 0], grad.new_tensor(9.0))
    for name, other in changed.items():
        same = torch.equal(row_hashes(other), row_hashes(grad))
        assert same == torch.equal(other, grad), name
    assert torch.equal(row_hashes(grad.T.contiguous().T), row_hashes(grad))


def test_a_change_that_plain_sums_of_bits_cannot_see_is_seen() -> None:
    grad = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    bits, negated = grad.view(torch.int32), (-grad).view(torch.int32)
    assert torch.equal(bits.sum(0), negated.sum(0)) and torch.equal(bits.sum(1), negated.sum(1))
    assert not torch.equal(row_hashes(grad), row_hashes(-grad))
