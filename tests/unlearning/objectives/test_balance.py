"""The forget gradient comes to the norm of the retain gradient, over what trains and over nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.strategies import layers, normal, seeds
from torch_simu import SIMUOptimizer
from torch_simu.optimizer import GradientBalance
from torch_simu.unlearning.differentiate import differentiate, retain_weight
from torch_simu.unlearning.objectives import Term


def balanced(forget: Tensor, retain: Tensor, mask: Tensor, weight: float, floor: float) -> Tensor:
    """The formula, on what the mask names."""
    f, r = forget[mask], retain[mask]
    return max(r.norm().item(), floor) * f / f.norm() + weight * r


@given(
    layers().filter(lambda layer: bool(layer.neurons)),
    seeds,
    st.sampled_from([0.01, 1.0, 50.0]),
    st.sampled_from([0.0, 2.0]),
    st.integers(1, 3),
)
def test_gradients_are_balanced_over_the_selected_entries(layer, seed, size, weight, parts):
    param = nn.Parameter(layer.weight(torch.float64))
    group = {"params": [param], "neurons": [list(layer.neurons)], "neuron_dim": layer.dim}
    balance = GradientBalance(SIMUOptimizer([group]))
    forget = [normal(seed + number, *param.shape, dtype=torch.float64) for number in range(parts)]
    retain = size * normal(seed + 7, *param.shape, dtype=torch.float64)
    for number, each in enumerate(forget):
        with balance.forget():
            (param * each).sum().backward()
        # Micro-batches of both sets take turns.
        (param * retain / parts).sum().backward()
        assert len(forget) == number + 1 or param.grad is not None
    balance.combine_(retain_weight=weight)
    mask = layer.mask()
    wanted = balanced(torch.stack(forget).sum(0), retain, mask, weight, 0.1)
    torch.testing.assert_close(param.grad[mask], wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(param.grad[~mask], weight * retain[~mask], rtol=1e-9, atol=1e-12)


def test_any_optimizer_can_be_balanced_and_a_parameter_may_have_one_gradient_only() -> None:
    both, one = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    balance = GradientBalance(torch.optim.AdamW([both, one]))
    with balance.forget():
        (3 * both[0] + 4 * one[1]).backward()
    (2 * both[1]).backward()
    balance.combine_(retain_weight=0.5)
    assert both.grad.tolist() == pytest.approx([1.2, 1.0]) and one.grad.tolist() == pytest.approx([0.0, 1.6])


def test_what_a_block_found_is_dropped_when_it_fails() -> None:
    weight = nn.Parameter(torch.ones(1))
    balance = GradientBalance(torch.optim.SGD([weight], lr=1.0))
    weight.grad = torch.full((1,), 7.0)
    with pytest.raises(ValueError, match="broken"), balance.forget():
        (2 * weight).sum().backward()
        raise ValueError("broken")
    assert weight.grad.item() == 7.0
    with pytest.raises(RuntimeError, match=r"No forget gradient was recorded, .*balance.forget\(\)"):
        balance.combine_()


@pytest.mark.parametrize("neurons", [None, [0, 1]])
def test_what_a_block_found_stays_when_its_memory_holds_the_next_gradient(neurons) -> None:
    """As with `gradient_as_bucket_view` of DDP."""
    weight = nn.Parameter(torch.ones(2, 2))
    balance = GradientBalance(SIMUOptimizer([{"params": [weight], "neurons": [neurons]}]))
    with balance.forget():
        (3 * weight[0, 0] + 4 * weight[0, 1]).backward()
        bucket = weight.grad
    weight.grad = bucket.zero_()
    (2 * weight[1, 1]).backward()
    balance.combine_()
    torch.testing.assert_close(weight.grad, torch.tensor([[1.2, 1.6], [0.0, 2.0]]))


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_scale_of_both_losses_is_that_of_the_balanced_gradient(scale) -> None:
    weight = nn.Parameter(torch.zeros(2))
    balance = GradientBalance(torch.optim.SGD([weight], lr=1.0))
    with balance.forget():
        (scale * 5 * weight[0]).backward()
    # Below the floor, which would play no part otherwise.
    (scale * 0.01 * weight[1]).backward()
    balance.combine_(retain_weight=2.0, grad_scale=scale)
    torch.testing.assert_close(weight.grad / scale, torch.tensor([0.1, 0.02]))


def test_a_step_uses_up_what_was_recorded() -> None:
    weight = nn.Parameter(torch.ones(1))
    balance = GradientBalance(torch.optim.SGD([weight], lr=1.0))
    with balance.forget():
        weight.sum().backward()
    balance.combine_()
    with pytest.raises(RuntimeError, match="No forget gradient"):
        balance.combine_()


def test_a_floor_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="floor is 0"):
        GradientBalance(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), floor=0.0)


def some_terms(weight: nn.Parameter) -> Iterator[Term]:
    yield Term("forget", -1.0, 10 * weight[0])
    yield Term("retain", 2.0, 3 * weight[1])
    yield Term("text", 4.0, weight[2])


def test_terms_are_summed_with_their_weights() -> None:
    weight = nn.Parameter(torch.zeros(3))
    found = differentiate(some_terms(weight))
    assert weight.grad.tolist() == [-10.0, 6.0, 4.0]
    assert {name: (each, loss.item()) for name, (each, loss) in found.items()} == {
        "forget": (-1.0, 0.0),
        "retain": (2.0, 0.0),
        "text": (4.0, 0.0),
    }


def test_balanced_terms_keep_the_proportion_of_those_that_retain() -> None:
    weight = nn.Parameter(torch.zeros(3))
    balance = GradientBalance(torch.optim.SGD([weight], lr=1.0))
    found = differentiate(some_terms(weight), balance=balance)
    assert weight.grad.tolist() == [0.0, 3.0, 2.0]
    balance.combine_(retain_weight=retain_weight(found))
    norm = 13**0.5
    assert weight.grad.tolist() == pytest.approx([-norm, 6.0, 4.0])


def test_only_the_forget_term_is_made_and_differentiated_inside_the_context() -> None:
    weight, inside, told = nn.Parameter(torch.zeros(3)), [], []

    class Place:
        def __enter__(self) -> None:
            inside.append(True)

        def __exit__(self, *_: object) -> None:
            inside.pop()

    def watched() -> Iterator[Term]:
        for term in some_terms(weight):
            told.append((term.name, "made", bool(inside)))
            yield term

    names = iter(["forget", "retain", "text"])

    def backward(loss: Tensor) -> None:
        told.append((next(names), "differentiated", bool(inside)))
        loss.backward()

    differentiate(watched(), at=Place, backward=backward)
    assert all(within == (name == "forget") for name, _, within in told) and len(told) == 6


def test_an_objective_without_terms_has_no_gradient() -> None:
    assert differentiate(iter(())) == {}


Mutant = Callable[[GradientBalance], None]


@pytest.mark.parametrize("which", ["whole", "unscaled"])
def test_a_wrong_balance_is_seen(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_simu.optimizer import balance as module

    right = module._norm
    wrong = (lambda entries: torch.ones(())) if which == "unscaled" else (lambda entries: 2 * right(entries[:1]))
    calls = iter([right, wrong] if which == "whole" else [wrong, wrong])
    monkeypatch.setattr(module, "_norm", lambda entries: next(calls)(entries))
    weight = nn.Parameter(torch.zeros(2))
    balance = GradientBalance(torch.optim.SGD([weight], lr=1.0))
    with balance.forget():
        (10 * weight[0]).backward()
    (3 * weight[1]).backward()
    balance.combine_(retain_weight=1.0)
    wanted = balanced(torch.tensor([10.0, 0.0]), torch.tensor([0.0, 3.0]), torch.ones(2, dtype=torch.bool), 1.0, 0.1)
    assert not torch.allclose(weight.grad, wanted)
