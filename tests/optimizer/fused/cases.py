"""What a fused step must do, each as a function of the device; run by `interpreted`, and on a GPU."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from tests.strategies import normal
from torch_simu import SIMUOptimizer

# Shape, neurons and dimension; blocks of the kernel have 128 columns, or fewer, and 1024 entries.
LAYOUTS = {
    "columns": ((9, 8), [0, 3, 6], -1),
    "one column": ((5, 3), [1], 1),
    "columns of several blocks": ((11, 421), range(1, 421, 3), -1),
    "rows": ((7, 5), [1, 2, 6], 0),
    "rows of several blocks": ((31, 131), range(0, 31, 2), -2),
    "no column": ((3, 4), [], -1),
    "whole": ((13, 17), None, -1),
    "whole vector": ((301,), None, -1),
    "whole scalar": ((), None, -1),
    "whole experts": ((2, 3, 5), None, -1),
    "some of a vector": ((10,), [2, 8], 0),
}
OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "clip": 0.3},
    "no momentum": {"betas": (0.0, 0.9), "eps": 0.5},
    "short momentum": {"betas": (0.3, 0.9), "rho": 0.04},
    "on the device": {"capturable": True, "weight_decay": 0.1},
    "tensor lr": {"capturable": True, "lr": [0.3], "weight_decay": 0.1},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "squared gradient": {"curvature": "squared_gradient", "hessian_interval": 2, "rho": 10.0},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(seed: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return normal(seed, math.prod(shape), dtype=dtype).reshape(shape)


def make(
    dtype: torch.dtype, device: str, fused: bool, transposed: bool = False, **options: object
) -> tuple[list[nn.Parameter], SIMUOptimizer]:
    """A weight of every layout, each a group of its own."""
    chosen = {"lr": 0.3, "rho": 1.0, "hessian_interval": 2, **options}
    if isinstance(chosen["lr"], list):
        chosen["lr"] = torch.tensor(chosen["lr"], device=device)
    groups = []
    for number, (shape, neurons, dim) in enumerate(LAYOUTS.values()):
        data = drawn(number, shape, dtype).to(device)
        if transposed and data.dim() == 2:
            data = data.T.contiguous().T
        group = {"params": [nn.Parameter(data)], "neurons": [None if neurons is None else list(neurons)]}
        groups.append({**group, "neuron_dim": dim})
    optimizer = SIMUOptimizer(groups, fused=fused, foreach=False, **chosen)
    return [group["params"][0] for group in groups], optimizer


def give(weights: list[nn.Parameter], number: int) -> None:
    for place, weight in enumerate(weights):
        weight.grad = drawn(100 * number + place, weight.shape, weight.dtype).to(weight.device)


def step(weights: list[nn.Parameter], optimizer: SIMUOptimizer, number: int) -> None:
    """A step and, where it is due, a refresh from other gradients."""
    give(weights, 2 * number)
    optimizer.step()
    if optimizer.param_groups[0]["curvature"] == "gnb" and optimizer.hessian_due:
        give(weights, 2 * number + 1)
        optimizer.update_hessian(3)


def outside(weight: torch.Tensor, layout: str) -> torch.Tensor:
    """Which entries are not selected."""
    _, neurons, dim = LAYOUTS[layout]
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    return mask if neurons is None else torch.ones_like(mask).index_fill_(dim, torch.tensor(list(neurons)).long(), 0)


def steps_are_those_of_the_eager_step(dtype: torch.dtype, options: str, device: str, transposed: bool = False) -> None:
    runs = [make(dtype, device, fused, transposed, **OPTIONS[options]) for fused in (False, True)]
    (eager, expected), (weights, fused) = runs
    start = [weight.detach().clone() for weight in weights]
    short = torch.bfloat16 in (dtype, OPTIONS[options].get("state_dtype"))
    for number in range(4):
        for each, optimizer in runs:
            step(each, optimizer, number)
        for place, (one, other) in enumerate(zip(eager, weights, strict=True)):
            # Triton's interpreter cuts bfloat16 off where a GPU rounds it to nearest: one spacing.
            spacing = {"rtol": 2**-7, "atol": 1e-6} if short else {"rtol": 2e-6, "atol": 2e-6}
            if dtype == torch.float16:
                spacing = {"rtol": 2**-10, "atol": 1e-6}
            torch.testing.assert_close(other, one, msg=lambda said, place=place: f"weight {place}: {said}", **spacing)
            kept, state = expected.state[one], fused.state[other]
            assert kept.keys() == state.keys()
            for key, value in kept.items():
                assert state[key].dtype == value.dtype
                torch.testing.assert_close(
                    state[key].float(), value.float(), rtol=2**-7 if short else 2e-6, atol=2e-6, msg=key
                )
                if short:
                    state[key].copy_(value)
            if short or dtype == torch.float16:
                other.data.copy_(one)
    assert [one["num_steps"] for one in fused.state_dict()["param_groups"]] == [4] * len(LAYOUTS)
    for layout, weight, first in zip(LAYOUTS, weights, start, strict=True):
        rest = outside(weight, layout).to(weight.device)
        assert torch.equal(weight[rest], first[rest]), layout
        assert layout == "no column" or (weight[~rest] != first[~rest]).any(), layout


def unselected_entries_are_bit_identical(dtype: torch.dtype, device: str) -> None:
    weights, optimizer = make(dtype, device, True, weight_decay=0.5)
    # NaN with a payload, minus zero and the smallest numbers are kept as well.
    odd = torch.tensor([math.nan, -0.0, 1e-45, -math.inf], device=device).to(dtype)
    for layout, weight in zip(LAYOUTS, weights, strict=True):
        rest = outside(weight, layout).to(device)
        weight.data[rest] = odd.repeat(-(-int(rest.sum()) // 4))[: int(rest.sum())]
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    start = [weight.detach().clone().view(bits) for weight in weights]
    for number in range(3):
        step(weights, optimizer, number)
    for layout, weight, first in zip(LAYOUTS, weights, start, strict=True):
        rest = outside(weight, layout).to(device)
        assert torch.equal(weight.detach().view(bits)[rest], first[rest]), layout
        assert weight[~rest].isfinite().all()


def a_step_that_is_not_finite_changes_nothing(dtype: torch.dtype, device: str) -> None:
    weights, optimizer = make(dtype, device, True, **OPTIONS["tensor lr"])
    for number in range(2):
        step(weights, optimizer, number)
    kept = [(weight.detach().clone(), {**optimizer.state[weight]}) for weight in weights]
    kept = [(weight, {key: value.clone() for key, value in state.items()}) for weight, state in kept]
    for bad in (math.nan, math.inf):
        give(weights, 9)
        weights[0].grad[2, 3] = bad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step()
        for weight, (before, state) in zip(weights, kept, strict=True):
            assert torch.equal(weight, before)
            assert all(torch.equal(optimizer.state[weight][key], value) for key, value in state.items())
    assert optimizer.diagnostics()["skipped_steps"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        step(weights, optimizer, 3)
    assert all((weight != before).any() for weight, (before, _) in zip(weights, kept, strict=True) if before.dim() < 2)


def a_reload_goes_on_bit_identically(device: str) -> None:
    weights, optimizer = make(torch.float32, device, True)
    for number in range(3):
        step(weights, optimizer, number)
    others, resumed = make(torch.float32, device, False)
    for one, other in zip(weights, others, strict=True):
        other.data.copy_(one)
    resumed.load_state_dict(optimizer.state_dict())
    assert all(group["fused"] for group in resumed.param_groups)
    # State of another order in memory is brought back to its own.
    state = resumed.state[others[6]]
    state["exp_avg"] = state["exp_avg"].T.contiguous().T
    for number in range(3, 5):
        step(weights, optimizer, number)
        step(others, resumed, number)
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))


def autograd_sees_that_a_weight_was_changed(device: str) -> None:
    weights, optimizer = make(torch.float32, device, True)
    versions = [weight._version for weight in weights]
    step(weights, optimizer, 0)
    changed = [weight._version > version for weight, version in zip(weights, versions, strict=True)]
    assert changed == [layout != "no column" for layout in LAYOUTS]


def named() -> dict[str, Callable[[str], None]]:
    """All cases, by name."""
    cases: dict[str, Callable[[str], None]] = {}
    short = ((dtype, options) for dtype in DTYPES[1:] for options in ("decay", "tensor lr", "bfloat16 state"))
    for dtype, options in (*((torch.float32, options) for options in OPTIONS), *short):
        cases[f"eager, {dtype}, {options}"] = lambda device, dtype=dtype, options=options: (
            steps_are_those_of_the_eager_step(dtype, options, device)
        )
    cases["eager, transposed"] = lambda device: steps_are_those_of_the_eager_step(
        torch.float32, "decay", device, transposed=True
    )
    for law in (unselected_entries_are_bit_identical, a_step_that_is_not_finite_changes_nothing):
        for dtype in DTYPES:
            cases[f"{law.__name__}, {dtype}"] = lambda device, law=law, dtype=dtype: law(dtype, device)
    for rest in (a_reload_goes_on_bit_identically, autograd_sees_that_a_weight_was_changed):
        cases[rest.__name__] = rest
    return cases
