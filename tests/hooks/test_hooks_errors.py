"""What hooks cannot capture raises, with the likely causes and what to do; many processes add up or raise together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tests.hooks.hooked_network import PLAIN
from tests.models import tiny
from torch_simu.hooks import NeuronHookError, register_neuron_hooks


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"reduce": "sum"}, ValueError, "reduce is 'sum', expected one of 'attribution', 'act', 'grad', 'sq'"),
        ({"reduce": 3}, TypeError, "reduce is 3, expected one of .*None or a callable"),
        ({"arg": -1}, ValueError, "arg is -1, expected a whole number >= 0"),
        ({"arg": 1.0}, TypeError, "arg is 1.0, expected the position or the name"),
        ({"arg": True}, TypeError, "arg is True, expected the position or the name"),
        ({"accum_dtype": torch.int8}, ValueError, "accum_dtype is torch.int8, expected a floating-point"),
        ({"position_mask": torch.ones(2)}, TypeError, r"position_mask is a tensor of torch.float32, .*attention_mask"),
        ({"position_mask": [True]}, TypeError, "position_mask is a list, expected a bool tensor"),
        ({"select": "absent"}, ValueError, "'absent' matches no layer"),
        ({"select": ["absent"]}, KeyError, "'absent' is not in the model"),
    ],
)
def test_wrong_arguments_raise_and_leave_no_hook(arguments: dict[str, object], kind: type, message: str) -> None:
    net = PLAIN.network()
    with pytest.raises(kind, match=message):
        register_neuron_hooks(net, **arguments)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_module_without_linear_layers_raises() -> None:
    with pytest.raises(ValueError, match=r"matches no layer, expected at least one.*none"):
        register_neuron_hooks(nn.Sequential(nn.ReLU()))


def test_neurons_inside_fused_experts_raise_and_their_input_can_be_captured() -> None:
    model = tiny("mixtral")
    with pytest.raises(
        ValueError, match=r"neurons of layer 'model.layers.0.mlp.experts' are inside .* attribute_neurons"
    ):
        register_neuron_hooks(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with register_neuron_hooks(model, r"mlp\.experts") as hooks:
        model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert hooks["model.layers.0.mlp.experts"].shape == (32,)


def test_an_unknown_layer_raises() -> None:
    with pytest.raises(KeyError, match=r"'up' has no hook, expected one of \['down'\]"):
        register_neuron_hooks(PLAIN.network(), "down")["up"]


def never_called(net: nn.Module) -> None:
    pass


def called_behind_its_back(net: nn.Module) -> None:
    net.down.forward(torch.ones(1, 5)).sum().backward()


def without_gradients(net: nn.Module) -> None:
    with torch.no_grad():
        net(PLAIN.inputs())


def under_inference_mode(net: nn.Module) -> None:
    with torch.inference_mode():
        net(PLAIN.inputs())


def without_backward(net: nn.Module) -> None:
    net(PLAIN.inputs())


def with_a_backward_elsewhere(net: nn.Module) -> None:
    torch.autograd.grad(net(PLAIN.inputs()).sum(), net.down.weight)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (never_called, "'down' was never called, expected .*torch.compile.*forward.*weight.*paused"),
        (called_behind_its_back, "'down' was never called"),
        (without_gradients, "'down' was called 2 times, but without gradients, .*no_grad"),
        (under_inference_mode, "'down' was called 2 times, but without gradients, .*inference_mode"),
        (without_backward, "'down' was called 2 times, but no backward reached it, .*Call backward"),
        (with_a_backward_elsewhere, "'down' was called 2 times, but no backward reached it"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_reading_a_layer_without_a_record_names_the_likely_causes(
    use: Callable[[nn.Module], None], message: str
) -> None:
    net = PLAIN.network()
    with register_neuron_hooks(net, "down") as hooks:
        use(net)
        with pytest.raises(NeuronHookError, match=message):
            hooks["down"]


def test_hooks_registered_after_a_compiled_call_raise_at_reading() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    compiled = torch.compile(net, backend="eager")
    x = torch.ones(1, 2)
    compiled(x).sum().backward()
    with register_neuron_hooks(net) as hooks:
        compiled(x).sum().backward()
        with pytest.raises(NeuronHookError, match=r"never called.*torch.compile, whose code runs no hooks"):
            hooks["1"]


def test_hooks_registered_before_a_compiled_call_raise_at_reading_and_change_nothing() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    x = torch.ones(1, 2)
    with register_neuron_hooks(net) as hooks:
        out = torch.compile(net, backend="eager")(x)
        out.sum().backward()
        with pytest.raises(NeuronHookError, match=r"never called.*torch.compile, whose code runs no hooks"):
            hooks["1"]
    assert torch.allclose(out, net(x))


def test_integers_raise() -> None:
    layer = nn.Embedding(3, 2)
    register_neuron_hooks(layer)
    with pytest.raises(NeuronHookError, match=r"Argument 0 of layer '' is a 1-D tensor of torch.int64, .*with arg="):
        layer(torch.tensor([1]))


@pytest.mark.parametrize("arg", [1, "other"])
def test_an_argument_that_is_not_passed_raises(arg: int | str) -> None:
    layer = nn.Linear(2, 1)
    register_neuron_hooks(layer, arg=arg)
    with pytest.raises(NeuronHookError, match=f"Argument {arg!r} of layer '' is a NoneType, expected a floating-point"):
        layer(torch.ones(1, 2))


def test_inference_tensors_raise() -> None:
    layer = nn.Linear(2, 1)
    with torch.inference_mode():
        x = torch.ones(1, 2)
    register_neuron_hooks(layer)
    with pytest.raises(NeuronHookError, match=r"made under torch.inference_mode\(\), expected .* Clone it"):
        layer(x)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (7,)])
def test_a_mask_of_another_shape_raises(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(2, 1)
    hooks = register_neuron_hooks(layer)
    hooks.position_mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(NeuronHookError, match=r"position_mask has shape .*, but layer '' has positions \(2, 4\)"):
        layer(torch.ones(2, 4, 2))


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        (lambda activation, gradient: 1.0, "reduce returned a float for layer '', expected a tensor"),
        (lambda activation, gradient: activation, r"returned shape \(2, 2\) for layer '', expected shape \(1, 2\)"),
    ],
)
def test_a_reduction_that_does_not_add_up_raises(reduce: Callable, message: str) -> None:
    layer = nn.Linear(2, 1)
    register_neuron_hooks(layer, reduce=reduce)
    with pytest.raises(NeuronHookError, match=message):
        for size in (1, 2):
            layer(torch.ones(size, 2)).sum().backward()


def test_one_process_already_has_the_sum() -> None:
    layer = nn.Linear(2, 1)
    with register_neuron_hooks(layer, reduce="act") as hooks:
        layer(torch.ones(1, 2)).sum().backward()
        hooks.all_reduce_()
    assert hooks[""].tolist() == [1.0, 1.0]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one_process_changes_nothing_it_had_read(process_group: None) -> None:
    net = PLAIN.network()
    with register_neuron_hooks(net) as hooks:
        net(PLAIN.inputs()).sum().backward()
        read = hooks["down"]
        hooks.all_reduce_()
    assert hooks["down"] is not read
    assert torch.equal(hooks["down"], read)


def test_a_layer_without_a_record_stops_all_processes(process_group: None) -> None:
    layer = nn.Linear(2, 1)
    with pytest.raises(NeuronHookError, match="recorded nothing for layer '', expected a record on each"):
        register_neuron_hooks(layer).all_reduce_()


def test_positions_of_many_processes_do_not_add_up() -> None:
    with pytest.raises(ValueError, match=r"keep every position \(reduce=None\), expected a reduction that adds up"):
        register_neuron_hooks(nn.Linear(2, 1), reduce=None).all_reduce_()


def run_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with register_neuron_hooks(net, reduce="act") as hooks:
        net(torch.full((1, 2), rank + 1.0)).sum().backward()
        own = hooks["0"]
        hooks.all_reduce_()
        assert own.tolist() == [rank + 1.0] * 2
        assert hooks["0"].tolist() == [3.0, 3.0]
        hooks.reset()
        if rank == 0:
            net(torch.ones(1, 2)).sum().backward()
        with pytest.raises(NeuronHookError, match=r"recorded nothing for layer '0', expected a record on each"):
            hooks.all_reduce_()
    dist.destroy_process_group()


def test_two_processes_add_up_what_they_recorded(tmp_path: Path) -> None:
    mp.spawn(run_two_processes, args=(str(tmp_path),), nprocs=2)
