"""Deltas leave outputs, codes and scales as they are (law 8), train as the dense columns would, and come off again."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.models import tiny
from tests.quantized import eight_bit, four_bit
from tests.strategies import normal, seeds
from torch_simu import NeuronSelection, SIMUOptimizer, attach_deltas, detach_deltas
from torch_simu.bitsandbytes.layers import eight_bit_codes
from torch_simu.deltas import attached_layers
from torch_simu.deltas import layer as delta_layer

pytestmark = pytest.mark.usefixtures("device")

SIZE, WIDTH = 64, 32


def float_linear(seed: int) -> nn.Module:
    layer = nn.Linear(SIZE, WIDTH)
    with torch.no_grad():
        layer.weight.copy_(normal(seed, WIDTH, SIZE))
        layer.bias.copy_(normal(seed + 1, WIDTH))
    return layer


def conv1d(seed: int) -> nn.Module:
    layer = Conv1D(WIDTH, SIZE)
    with torch.no_grad():
        layer.weight.copy_(normal(seed, SIZE, WIDTH))
    return layer


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "linear": float_linear,
    "conv1d": conv1d,
    "8bit": lambda seed: eight_bit(seed, SIZE, WIDTH),
    "8bit, no bias": lambda seed: eight_bit(seed, SIZE, WIDTH, bias=False),
    "8bit, outliers": lambda seed: eight_bit(seed, SIZE, WIDTH, threshold=6.0),
    "4bit": lambda seed: four_bit(seed, SIZE, WIDTH),
}
kinds, dtypes = st.sampled_from(list(KINDS)), st.sampled_from([torch.float32, torch.bfloat16])
neurons = st.sets(st.integers(0, SIZE - 1), min_size=1)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of the input."""
    x = x.clone().requires_grad_()
    y = model(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), gradient


def as_model(kind: str, seed: int, dtype: torch.dtype) -> nn.Module:
    layer = KINDS[kind](seed)
    return nn.Sequential(layer.to(dtype) if kind in ("linear", "conv1d") else layer)


def frozen_bits(layer: nn.Module) -> list[bytes]:
    codes = eight_bit_codes(layer) if hasattr(layer, "state") else (layer.weight, getattr(layer, "SCB", layer.weight))
    state = getattr(layer.weight, "quant_state", None)
    more = [value for _, value in sorted(state.as_dict(packed=True).items())] if state is not None else []
    bias = [layer.bias] if layer.bias is not None else []
    return [bits(each) for each in (*codes, *more, *bias)]


def assert_codes_outlive_training(kind: str, chosen: set[int], dtype: torch.dtype, train: bool, seed: int) -> None:
    """Law 8."""
    model = as_model(kind, seed, dtype).train(train)
    x = 4 * normal(seed + 2, 2, 5, SIZE, dtype=dtype)
    # Computed by bitsandbytes itself, on a copy, since its layers change in their first pass.
    expected = run(copy.deepcopy(model), x)
    keys = set(copy.deepcopy(model).state_dict())
    before, plain = frozen_bits(model[0]), type(model[0])
    deltas = attach_deltas(model, NeuronSelection({"0": chosen}, {"0": SIZE}))
    assert set(model.state_dict()) == {*keys, "0.delta", "0.idx"}
    assert all(torch.equal(*pair) for pair in zip(run(model, x), expected, strict=True))
    assert [name for name, param in model.named_parameters() if param.requires_grad] == ["0.delta"]
    optimizer = SIMUOptimizer(list(deltas.values()), lr=0.1, weight_decay=0.1, hessian_interval=10)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert deltas["0"].dtype == torch.float32 and deltas["0"].any()
    assert not torch.equal(model(x).detach(), expected[0])
    assert frozen_bits(model[0]) == before
    detach_deltas(model)
    assert type(model[0]) is plain and set(model.state_dict()) == keys
    # Before bitsandbytes casts its bias in place again.
    assert frozen_bits(model[0]) == before
    assert all(torch.equal(*pair) for pair in zip(run(model, x), expected, strict=True))


@given(kinds, neurons, dtypes, st.booleans(), seeds)
def test_attaching_changes_no_bit_and_training_no_code(
    kind: str, chosen: set[int], dtype: torch.dtype, train: bool, seed: int
) -> None:
    assert_codes_outlive_training(kind, chosen, dtype, train, seed)


def _casts_the_bias(original: Callable) -> Callable:
    def attach(layer: nn.Module, chosen: Tensor) -> nn.Parameter:
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.bfloat16()
        return original(layer, chosen)

    return attach


def _quantizes_anew(original: Callable) -> Callable:
    def detach(layer: nn.Module) -> None:
        original(layer)
        layer.weight.data.neg_()

    return detach


def _starts_off_zero(original: Callable) -> Callable:
    def attach(layer: nn.Module, chosen: Tensor) -> nn.Parameter:
        delta = original(layer, chosen)
        delta.data.add_(1e-3)
        return delta

    return attach


@pytest.mark.parametrize(
    ("name", "mutant"), [("attach", _casts_the_bias), ("detach", _quantizes_anew), ("attach", _starts_off_zero)]
)
def test_the_law_tells_mutants(monkeypatch: pytest.MonkeyPatch, name: str, mutant: Callable) -> None:
    from torch_simu.deltas import attach as module

    monkeypatch.setattr(module, name, mutant(getattr(delta_layer, name)))
    with pytest.raises(AssertionError):
        assert_codes_outlive_training("8bit", {1, 5}, torch.float32, False, 0)


@given(kinds, neurons, seeds)
def test_the_gradient_of_a_delta_is_that_of_the_dense_columns(kind: str, chosen: set[int], seed: int) -> None:
    model, x = as_model(kind, seed, torch.float32), normal(seed + 2, 2, 5, SIZE)
    delta = attach_deltas(model, NeuronSelection({"0": chosen}, {"0": SIZE}))["0"]
    y = model(x)
    along = normal(seed + 3, *y.shape)
    y.backward(along)
    dense = torch.einsum("bto,bti->oi", along, x)
    torch.testing.assert_close(delta.grad, dense[:, sorted(chosen)], rtol=1e-6, atol=1e-6 * dense.abs().max().item())


@given(kinds, seeds)
def test_second_derivatives_pass_through(kind: str, seed: int) -> None:
    model, x = as_model(kind, seed, torch.float32), normal(seed + 2, 3, SIZE).requires_grad_()
    delta = attach_deltas(model, NeuronSelection({"0": [1, 5]}, {"0": SIZE}))["0"]
    with torch.no_grad():
        delta.copy_(normal(seed + 3, WIDTH, 2))
    first = torch.autograd.grad(model(x).pow(3).sum(), (x, delta), create_graph=True)
    second = torch.autograd.grad(first[0].sum() + first[1].sum(), delta)[0]
    moved, step = [], 1e-2
    for sign in (1, -1):
        with torch.no_grad():
            delta.add_(sign * step * torch.ones_like(delta) * (1 if sign == 1 else 2))
        inner = torch.autograd.grad(model(x).pow(3).sum(), (x, delta))
        moved.append(sum(each.sum().double() for each in inner))
    expected = (moved[0] - moved[1]) / (2 * step)
    # In 8 bits the output is rounded, and so is the difference; the codes' own error is no part of it.
    assert second.sum().double().item() == pytest.approx(
        expected.item(), rel=2e-2, abs=1e-1 * first[1].abs().max().item()
    )


def test_an_empty_selection_attaches_nothing() -> None:
    model = nn.Sequential(float_linear(0))
    assert attach_deltas(model, NeuronSelection({}, {"0": SIZE})) == {}
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    with pytest.raises(
        ValueError, match="No layer of the model has a delta, expected at least one. Call attach_deltas"
    ):
        detach_deltas(model)


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))
    model[1].weight = model[0].weight
    return model


def _packed() -> nn.Module:
    model = nn.Sequential(four_bit(0, SIZE, WIDTH))
    model[0].weight.quant_state.packing_format_for_cpu = True
    return model


def _compiled_inside() -> nn.Module:
    model = nn.Sequential(float_linear(0))
    model[0].compile()
    return model


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("model", "size", "error", "message"),
    [
        (lambda: nn.Sequential(float_linear(0)), 8, ValueError, "has 64 neurons, the selection counts 8"),
        (lambda: nn.ReLU(), SIZE, KeyError, "Layer '0' is not in the model"),
        (lambda: nn.Sequential(nn.ReLU()), SIZE, TypeError, "Layer '0' is a ReLU, expected nn.Linear"),
        (lambda: nn.Sequential(nn.Linear(SIZE, 2, device="meta")), SIZE, ValueError, "is on the meta device"),
        (_tied, SIZE, ValueError, "Layers '0' and '1' share one weight"),
        (_packed, SIZE, ValueError, "codes of the 4-bit layer '0' were packed for inference"),
        (_compiled_inside, SIZE, ValueError, "Layer '0' is compiled, expected one that is not"),
        (lambda: torch.compile(nn.Sequential(float_linear(0))), SIZE, ValueError, "The model is compiled"),
    ],
)
def test_what_cannot_have_a_delta_is_refused_and_nothing_is_attached(model, size, error, message) -> None:
    model = model()
    with pytest.raises(error, match=message):
        attach_deltas(model, NeuronSelection({"0": [0]}, {"0": size}))
    assert not attached_layers(model)


def test_attaching_twice_fused_experts_and_no_selection_are_refused() -> None:
    model = nn.Sequential(float_linear(0))
    selection = NeuronSelection({"0": [0]}, {"0": SIZE})
    attach_deltas(model, selection)
    with pytest.raises(ValueError, match="Layer '0' has a delta already, expected none. Call merge_deltas"):
        attach_deltas(model, selection)
    with pytest.raises(TypeError, match="selection is a dict, expected a NeuronSelection"):
        attach_deltas(model, {"0": [0]})
    experts = tiny("mixtral")
    with pytest.raises(TypeError, match=r"is a transformers\S+\.MixtralExperts, expected nn.Linear.*Train the experts"):
        attach_deltas(experts, NeuronSelection.random(experts, 0.1, torch.Generator().manual_seed(0)))
