"""On a GPU a whitened step and its refresh wait for nothing: shown on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from tests.fake_cuda.waits import Waits, fake_cuda, fake_model
from torch_simu import NeuronSelection, SIMUOptimizer, attach_deltas, register_neuron_hooks
from torch_simu.hooks import NeuronHooks, record
from torch_simu.optimizer import GradientBalance

SELECTION = NeuronSelection({"0": [1, 3], "2": [0, 2, 5]}, {"0": 4, "2": 6})
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capturable": {"capturable": True},
    "decay": {"weight_decay": 0.1},
    "stochastic rounding": {"stochastic_rounding": True},
    "master weights": {"master_weights": True},
    "maximize": {"maximize": True},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "tensor lr": {"lr": torch.tensor(0.01)},
}


def network() -> nn.Sequential:
    """Two layers, whose first has a bias that trains, too."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2, bias=False))


def seen(hooks: NeuronHooks, number: int, dtype: torch.dtype, device: dict[str, str]) -> None:
    """Let hooks record what a backward would hand over: autograd takes fake tensors on a GPU only."""
    with torch.no_grad():
        for name, layer in hooks.layers.items():
            sides = [(hooks._records[name], layer.in_features)]
            sides += [(hooks._outputs[name], layer.out_features)] if hooks.keeps_outputs else []
            for side, size in sides:
                side.add(number, *(torch.empty(15, size, dtype=dtype, device=device.get(name, "cuda")) for _ in "ag"))


@contextmanager
def trained(
    dtype: torch.dtype, options: dict[str, Any], *, select: Any = SELECTION, device: dict[str, str] | None = None
) -> Iterator[Callable[[], SIMUOptimizer]]:
    """Yield a function that makes a refresh and two steps, one of them of balanced gradients."""
    device, both = device or {}, options.get("curvature") == "both"
    made = network()
    with fake_cuda() as fake:
        model = fake_model(made, fake, dtype)
        for name, place in device.items():
            for key, param in list(model.get_submodule(name).named_parameters()):
                moved = torch.empty(param.shape, dtype=dtype, device=place)
                setattr(model.get_submodule(name), key, nn.Parameter(moved))
        if select == "deltas":
            params: Any = list(attach_deltas(model, SELECTION).values())
        elif select == "whole":
            params = [{"params": [model[0].weight, model[2].weight, model[0].bias]}]
        else:
            params = SELECTION.param_groups(model)
        optimizer = SIMUOptimizer(params, **{"curvature": "neurons", **options})
        hooked = {"deltas": SELECTION, "whole": None}.get(select, select) if isinstance(select, str) else select
        hooks = register_neuron_hooks(model, hooked, reduce="covariance", outputs=both)
        balance = GradientBalance(optimizer)

        def grads() -> None:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.empty_like(param)

        def once() -> SIMUOptimizer:
            seen(hooks, 0, dtype, device)
            optimizer.update_curvature(hooks)
            with balance.forget():
                grads()
            grads()
            balance.combine_(retain_weight=2.0)
            for _ in range(2):
                optimizer.step()
            return optimizer

        yield once


def waits_of(once: Callable[[], SIMUOptimizer]) -> Waits:
    """What waits, when the state is there and the indices were copied."""
    once()
    with Waits() as waits:
        once()
    return waits


@pytest.fixture(autouse=True)
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many neurons were looked for, each time: fake ones have no data to look at."""
    found: list[int] = []

    def holds(_own: Tensor, _places: Tensor, neurons: Tensor) -> bool:
        found.append(len(neurons))
        return True

    monkeypatch.setattr(record, "_holds", holds)
    return found


def on_the_device(optimizer: SIMUOptimizer) -> bool:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return all(value.device.type == "cuda" for value in values if isinstance(value, Tensor))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("curvature", ["neurons", "both"])
def test_a_step_and_a_refresh_neither_read_the_device_nor_copy_between_devices(
    options: dict[str, Any], dtype: torch.dtype, curvature: str, looks: list[int]
) -> None:
    with trained(dtype, {"curvature": curvature, **options}) as once:
        assert waits_of(once).counts == {}
        assert on_the_device(once())
    # The neurons of a layer are looked for once, not at every refresh.
    assert looks == [2, 3]


@pytest.mark.parametrize("select", [["0", "2"], "whole", "deltas"], ids=str)
def test_hooks_on_all_neurons_and_deltas_wait_for_nothing(select: Any) -> None:
    with trained(torch.float32, {"curvature": "both"}, select=select) as once:
        assert waits_of(once).counts == {}
        assert on_the_device(once())


def test_a_model_on_two_devices_is_whitened_where_its_layers_are() -> None:
    with trained(torch.float32, {"curvature": "both"}, device={"0": "cuda:0", "2": "cuda:1"}) as once:
        counts = waits_of(once).counts
        optimizer = once()
        places = [{value.device for value in state.values()} for state in optimizer.state.values()]
    # Scalars that tell whether all is finite go from one to the other; none comes to the processor.
    assert counts == {}
    assert places == [{torch.device("cuda:0")}, {torch.device("cuda:1")}]


def test_looking_at_the_neurons_of_each_refresh_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_simu.optimizer.curvature import factors

    def places(trained: Any, hooks: NeuronHooks, **_: bool) -> Tensor:
        torch.equal(trained.neurons, trained.neurons)
        return trained.neurons

    monkeypatch.setattr(factors, "_places", places)
    with trained(torch.float32, {}) as once, Waits() as waits, pytest.raises(DataDependentOutputException):
        once()
    assert waits.counts["equal"] == 1
