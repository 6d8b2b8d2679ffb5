"""Law 6: hooks leave the model as they found it, and capture each use of a layer exactly."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from tests.hooks.hooked_network import PLAIN, Case, Net, cases, loss_of, naive_capture
from torch_simu.hooks import NeuronHookError, NeuronHooks, register_neuron_hooks

pytestmark = pytest.mark.usefixtures("device")

Register = Callable[..., NeuronHooks]


def fingerprint(module: nn.Module) -> dict[str, object]:
    """Everything that can be written on a module: attributes, hooks, flags, parameters, state."""
    found: dict[str, object] = {}
    for name, inner in module.named_modules():
        found[f"{name}|type"] = type(inner)
        for key, value in vars(inner).items():
            found[f"{name}|{key}"] = list(value) if isinstance(value, dict | set) else value
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        found[f"{name}|tensor"] = (id(tensor), tensor.requires_grad, tensor._version, tensor.detach().tolist())
        found[f"{name}|hooks"] = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
    found["state"] = list(module.state_dict())
    return found


# The laws, for any way to register hooks; the mutants at the end must fail them.


def assert_capture_is_exact(register: Register, case: Case) -> None:
    """Each use of the layer is captured once, in forward order, with its own gradient only."""
    net = case.network()
    with register(net, "down", reduce=None) as hooks:
        loss_of(net(case.inputs())).backward()
    expected = naive_capture(case)
    assert hooks["down"].shape == (2, expected[0].shape[0], case.d_ff)
    for found, wanted in zip(hooks["down"], expected, strict=True):
        assert torch.equal(found, wanted)


def break_nothing(register: Register, net: nn.Module, x: Tensor) -> None:
    with register(net) as hooks:
        net(x).sum().backward()
    assert list(hooks)


def break_in_the_block(register: Register, net: nn.Module, x: Tensor) -> None:
    with register(net):
        net(x).sum().backward()
        raise OSError("user code")


def break_in_the_forward(register: Register, net: nn.Module, x: Tensor) -> None:
    with register(net):
        net(x[..., :-1])


def break_in_the_backward(register: Register, net: nn.Module, x: Tensor) -> None:
    def refuse(_: Tensor) -> Tensor:
        raise OSError("backward")

    with register(net):
        out = net(x)
        out.register_hook(refuse)
        out.sum().backward()


def break_in_the_reduction(register: Register, net: nn.Module, x: Tensor) -> None:
    def refuse(activation: Tensor, gradient: Tensor) -> Tensor:
        raise OSError("reduction")

    with register(net, reduce=refuse):
        net(x).sum().backward()


def break_by_another_mask(register: Register, net: nn.Module, x: Tensor) -> None:
    with register(net, position_mask=torch.ones(99, dtype=torch.bool)):
        net(x)


def break_by_reading_too_early(register: Register, net: nn.Module, x: Tensor) -> None:
    with register(net) as hooks:
        hooks["down"]


def break_by_inference_tensors(register: Register, net: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        frozen = x.clone()
    with register(net):
        net(frozen)


def break_by_integers(register: Register, net: nn.Module, x: Tensor) -> None:
    with register(net):
        net(x.long())


def break_at_registration(register: Register, net: nn.Module, x: Tensor) -> None:
    register(net, "absent")


FAILURES = [value for name, value in globals().items() if name.startswith("break_")]


def assert_model_is_left_as_found(
    register: Register, failure: Callable[[Register, nn.Module, Tensor], None], case: Case
) -> None:
    """After any failure nothing is left on the model, and it computes the same."""
    net, twin = case.network(), case.network()
    net.train(case.twice)
    before = fingerprint(net)
    if failure is break_nothing:
        failure(register, net, case.inputs())
    else:
        # The kind of error is another test's business; only that some error was there matters here.
        with pytest.raises((OSError, RuntimeError, ValueError)):
            failure(register, net, case.inputs())
    assert fingerprint(net) == before
    net.zero_grad()
    outs = net(case.inputs()), twin(case.inputs())
    assert torch.equal(*outs)
    if not case.frozen:
        for out in outs:
            loss_of(out).backward()
        for param, other in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(param.grad, other.grad)


def assert_closed_hooks_stay_silent(register: Register, case: Case) -> None:
    """A backward through a graph made before the hooks were removed records nothing."""
    net = case.network()
    with register(net, "down", reduce="act") as hooks:
        out = net(case.inputs())
        loss_of(out).backward(retain_graph=True)
        before = hooks["down"].clone()
        later = loss_of(net(case.inputs()))
    later.backward()
    assert torch.equal(hooks["down"], before)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.__name__)
@given(case=cases.filter(lambda case: case.checkpointing != "reentrant"))
def test_hooks_leave_the_model_as_they_found_it_even_after_an_exception(failure: Callable, case: Case) -> None:
    assert_model_is_left_as_found(register_neuron_hooks, failure, case)


@given(case=cases.filter(lambda case: case.checkpointing == "off"))
def test_a_closed_hook_stays_silent_in_a_later_backward(case: Case) -> None:
    assert_closed_hooks_stay_silent(register_neuron_hooks, case)


@given(case=cases.filter(lambda case: not case.frozen))
def test_outputs_and_parameter_gradients_do_not_change_under_hooks(case: Case) -> None:
    net, twin = case.network(), case.network()
    outs = []
    with register_neuron_hooks(net):
        for model in (net, twin):
            outs.append(model(case.inputs()))
            loss_of(outs[-1]).backward()
    assert torch.equal(*outs)
    for param, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param.grad, other.grad)


def test_a_copy_of_a_hooked_model_falls_silent_with_it() -> None:
    net = PLAIN.network()
    with register_neuron_hooks(net, "down") as hooks:
        loss_of(net(PLAIN.inputs())).backward()
        twin = copy.deepcopy(net)
    before = hooks["down"].clone()
    loss_of(twin(PLAIN.inputs())).backward()
    assert torch.equal(hooks["down"], before)


def test_removing_twice_does_nothing_and_removed_hooks_stay_readable() -> None:
    net = PLAIN.network()
    hooks = register_neuron_hooks(net, "down")
    loss_of(net(PLAIN.inputs())).backward()
    hooks.remove()
    hooks.remove()
    assert hooks["down"].shape == (5,)
    assert not net.down._forward_pre_hooks


def test_removing_between_a_checkpointed_forward_and_its_backward_is_loud() -> None:
    case = replace(PLAIN, checkpointing="non_reentrant")
    net = case.network()
    with register_neuron_hooks(net, "down") as hooks:
        loss = loss_of(net(case.inputs()))
    with pytest.raises(CheckpointError):
        loss.backward()
    with pytest.raises(NeuronHookError):
        hooks["down"]


@given(case=cases)
def test_capture_equals_the_naive_oracle_whatever_the_use_of_the_layer(case: Case) -> None:
    assert_capture_is_exact(register_neuron_hooks, case)


# Mutants: wrong hooks that the laws must tell apart from right ones.


class LeftBehind(NeuronHooks):
    """Hooks that go only when all went well."""

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.remove()


class NeverSilent(NeuronHooks):
    """Hooks that trust their handles."""

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def mutant(kind: type[NeuronHooks]) -> Register:
    def register(*args: object, **kwargs: object) -> NeuronHooks:
        hooks = register_neuron_hooks(*args, **kwargs)
        hooks.__class__ = kind
        return hooks

    return register


@contextlib.contextmanager
def hooks_on_tensors(net: Net, select: str, reduce: None) -> Iterator[dict[str, Tensor]]:
    """Hooks on the input tensors, whose gradient sums all consumers."""
    pairs: list[list[Tensor]] = []
    found: dict[str, Tensor] = {}

    def pre_hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        pair = [args[0].detach().flatten(0, -2)]
        pairs.append(pair)
        args[0].register_hook(lambda gradient: pair.append(gradient.flatten(0, -2)))

    handle = net.get_submodule(select).register_forward_pre_hook(pre_hook)
    yield found
    handle.remove()
    found[select] = torch.cat([torch.stack(pair) for pair in pairs], 1)


def test_the_law_tells_a_hook_left_behind() -> None:
    with pytest.raises(AssertionError):
        assert_model_is_left_as_found(mutant(LeftBehind), break_in_the_block, PLAIN)


def test_the_law_tells_a_hook_that_is_not_silent() -> None:
    with pytest.raises(AssertionError):
        assert_closed_hooks_stay_silent(mutant(NeverSilent), PLAIN)


def test_the_law_tells_hooks_that_sum_all_consumers() -> None:
    alone = replace(PLAIN, consumers=False, twice=False)
    assert_capture_is_exact(hooks_on_tensors, alone)
    with pytest.raises(AssertionError):
        assert_capture_is_exact(hooks_on_tensors, PLAIN)
