"""Deltas act on layers that other libraries had their hands on, or the layer is refused before anything changes."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.models import tiny
from tests.quantized import eight_bit, four_bit
from tests.strategies import normal
from torch_simu import NeuronSelection, attach_deltas, attribute_neurons, detach_deltas, merge_deltas
from torch_simu.deltas import attached_layers
from torch_simu.layers import check_kind, check_weight

SIZE, WIDTH = 64, 32
CHOSEN = NeuronSelection({"0": [1, 5]}, {"0": SIZE})


def aligned(model: nn.Module) -> nn.Module:
    add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


def dispatched(model: nn.Module) -> nn.Module:
    return dispatch_model(model, {"0": "cpu"}, main_device="cpu", force_hooks=True)


def hooked_twice(model: nn.Module) -> nn.Module:
    add_hook_to_module(model[0], ModelHook())
    add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu"), append=True)
    return model


LAYERS = {
    "linear": lambda: nn.Linear(SIZE, WIDTH),
    "8bit": lambda: eight_bit(0, SIZE, WIDTH),
    "4bit": lambda: four_bit(0, SIZE, WIDTH),
}


@pytest.mark.parametrize("dispatch", [aligned, dispatched, hooked_twice])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_a_delta_acts_under_the_hooks_of_accelerate(kind: str, dispatch) -> None:
    plain = nn.Sequential(LAYERS[kind]()).eval()
    model = dispatch(copy.deepcopy(plain))
    # With a gradient, without which bitsandbytes packs 4-bit codes on some processors.
    x, change = normal(0, 3, SIZE).requires_grad_(), normal(1, WIDTH, 2)
    before = model(x)
    for each in (plain, model):
        delta = attach_deltas(each, CHOSEN)["0"]
        with torch.no_grad():
            delta.copy_(change)
    assert torch.equal(model(x), plain(x)) and not torch.equal(model(x), before)
    model(x).sum().backward()
    assert delta.grad is not None and delta.grad.any()
    assert torch.equal(copy.deepcopy(model)(x), plain(x))
    detach_deltas(model)
    assert torch.equal(model(x), before)
    attach_deltas(model, CHOSEN)["0"].data.copy_(change)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("first", ["hooks", "delta"])
def test_a_delta_outlives_the_hooks_of_accelerate_and_they_outlive_it(first: str) -> None:
    model, x = aligned(nn.Sequential(nn.Linear(SIZE, WIDTH))), normal(0, 3, SIZE)
    before = model(x)
    attach_deltas(model, CHOSEN)["0"].data.fill_(0.5)
    changed = model(x)
    if first == "hooks":
        remove_hook_from_module(model[0])
        assert torch.equal(model(x), changed)
        detach_deltas(model)
    else:
        detach_deltas(model)
        assert torch.equal(model(x), before)
        remove_hook_from_module(model[0])
    assert torch.equal(model(x), before) and type(model[0]) is nn.Linear
    add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu"))
    attach_deltas(model, CHOSEN)["0"].data.fill_(0.5)
    assert torch.equal(model(x), changed)


def test_merging_under_the_hooks_of_accelerate_keeps_the_change() -> None:
    model, x = aligned(nn.Sequential(nn.Linear(SIZE, WIDTH))), normal(0, 3, SIZE)
    attach_deltas(model, CHOSEN)["0"].data.fill_(0.5)
    changed = model(x)
    merge_deltas(model)
    torch.testing.assert_close(model(x), changed, rtol=1e-5, atol=1e-5)


class _Swapped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.round(), self.bias)


class _Renamed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class _Wrapped(Tensor):
    """A weight as other quantizers keep it."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        plain = [each.inner if isinstance(each, cls) else each for each in args]
        return func(*plain, **(kwargs or {}))


def _wrapped_weight(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(_Wrapped(layer.weight.detach()), requires_grad=False)
    return layer


def _eight_bit_floats(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return layer


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _doubled(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", _Doubled())
    return layer


COMPUTED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", amount=0.3),
    "doubled": _doubled,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("change", [*COMPUTED.values(), nn.utils.weight_norm], ids=[*COMPUTED, "old weight norm"])
def test_a_weight_that_is_computed_is_refused_by_deltas_and_groups(change) -> None:
    model = nn.Sequential(change(nn.Linear(SIZE, WIDTH)))
    message = r"Layer '0', a .*Linear, computes its (weight|bias) from other parameters, expected .* of its own"
    for use in (lambda: attach_deltas(model, CHOSEN), lambda: CHOSEN.param_groups(model, attention="frozen")):
        with pytest.raises(ValueError, match=message):
            use()
    assert not attached_layers(model)
    assert all(param.requires_grad for param in model.parameters())


def _offloaded() -> nn.Module:
    return cpu_offload(nn.Sequential(nn.Linear(SIZE, WIDTH)), execution_device=torch.device("cpu"))


def test_offloaded_layers_are_refused_by_deltas_and_groups() -> None:
    for use in (attach_deltas, lambda model, chosen: chosen.param_groups(model, attention="frozen")):
        with pytest.raises(ValueError, match="'0' is on the meta device, expected data. Load the model first"):
            use(_offloaded(), CHOSEN)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (_Swapped, r"test_deltas_door\._Swapped, computes something else than its weight says.*BitsAndBytesConfig"),
        (lambda *sizes: _wrapped_weight(nn.Linear(*sizes)), r"holds its weight as a .*test_deltas_door\._Wrapped"),
        (lambda *sizes: _eight_bit_floats(nn.Linear(*sizes)), r"a Linear, holds torch\.float8_e4m3fn codes"),
    ],
)
def test_layers_of_other_quantizers_are_refused_by_their_real_class(layer, message) -> None:
    model = nn.Sequential(layer(SIZE, WIDTH))
    with pytest.raises(TypeError, match=message):
        attach_deltas(model, CHOSEN)
    with pytest.raises(TypeError, match=message):
        CHOSEN.param_groups(model, attention="frozen")
    assert not attached_layers(model)


def test_a_class_that_computes_what_its_weight_says_is_welcome() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_weight("0", _Renamed(SIZE, WIDTH).to(dtype))
    attach_deltas(nn.Sequential(_Renamed(SIZE, WIDTH)), CHOSEN)


def _other(name: str, module: str, **attributes) -> nn.Module:
    made = type(name, (nn.Module,), {"__module__": module})()
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            lambda: _other("Linear", "peft.tuners.lora.layer", base_layer=nn.Linear(SIZE, WIDTH), in_features=SIZE),
            r"Layer '0' is a peft\.tuners\.lora\.layer\.Linear, expected .* name '0\.base_layer', or merge the adapter",
        ),
        (
            lambda: _other("HQQLinear", "hqq.core.quantize", in_features=SIZE, out_features=WIDTH),
            r"Layer '0' is a hqq\.core\.quantize\.HQQLinear, expected .*BitsAndBytesConfig\(load_in_8bit=True\)",
        ),
        (
            lambda: _other("QuantLinear", "auto_gptq.nn_modules", infeatures=SIZE),
            r"Layer '0' is a auto_gptq\.nn_modules\.QuantLinear, expected .*Load the model in float",
        ),
    ],
)
def test_layers_without_neurons_of_their_own_are_refused_by_every_entry(layer, message) -> None:
    model, ids = nn.Sequential(layer()), torch.tensor([[1, 2]])
    for use in (
        lambda: attach_deltas(model, CHOSEN),
        lambda: CHOSEN.param_groups(model, attention="frozen"),
        lambda: attribute_neurons(model, [{"input_ids": ids, "labels": ids}], select=["0"]),
        lambda: check_kind("0", model[0]),
    ):
        with pytest.raises(TypeError, match=message):
            use()


def test_the_layer_inside_an_adapter_has_neurons() -> None:
    inner = nn.Linear(SIZE, WIDTH)
    model = nn.Sequential(_other("Linear", "peft.tuners.lora.layer", base_layer=inner))
    assert list(attach_deltas(model, NeuronSelection({"0.base_layer": [1]}, {"0.base_layer": SIZE}))) == [
        "0.base_layer"
    ]


def test_a_model_whose_down_projections_are_wrapped_names_the_wrapper() -> None:
    model = tiny("llama")
    for block in model.model.layers:
        block.mlp.down_proj = _other("Linear", "peft.tuners.lora.layer", base_layer=block.mlp.down_proj)
    with pytest.raises(TypeError, match=r"is a peft\.tuners\.lora\.layer\.Linear.*down_proj\.base_layer'"):
        NeuronSelection.full(model)


def test_a_forward_that_something_else_put_on_the_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(SIZE, WIDTH))
    model[0].forward = types.MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), model[0])
    with pytest.raises(ValueError, match="Layer '0' has a forward of its own, which another library put on it"):
        attach_deltas(model, CHOSEN)
    add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(ValueError, match="Layer '0' has a forward of its own, which another library put on it"):
        attach_deltas(model, CHOSEN)
