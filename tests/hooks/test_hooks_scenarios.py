"""Hooks capture what autograd says, however a layer is wrapped, fed or compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from tests.hooks.hooked_network import PLAIN, Case, cases, loss_of, retained
from tests.strategies import normal
from torch_simu.hooks import NeuronHookError, register_neuron_hooks
from torch_simu.hooks.tap import InputTap


def assert_retained(module: nn.Module, names: list[str], run: Callable[[], Tensor]) -> None:
    """The hooks capture what `retain_grad` keeps, bit for bit."""
    with retained(module, names) as expected:
        loss_of(run()).backward()
    with register_neuron_hooks(module, names, reduce=None) as hooks:
        loss_of(run()).backward()
    for name in names:
        assert torch.equal(hooks[name], torch.stack(expected[name])), name


# Shared inputs, several arguments, outputs that are no tensor


def test_layers_that_share_an_input_get_their_own_gradients() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(4, 3, bias=False) for _ in range(3))

        def forward(self, *inputs: Tensor) -> Tensor:
            query, key, value, residual = inputs if len(inputs) > 1 else inputs * 4
            return (self.query(query) * self.key(key)).softmax(-1) @ self.value(value).mT + residual.sum()

    net, x = Shared(), normal(1, 2, 5, 4)
    with register_neuron_hooks(net, reduce=None) as hooks:
        loss_of(net(x)).backward()
    edges = [x.clone().requires_grad_() for _ in range(4)]
    gradients = torch.autograd.grad(loss_of(net(*edges)), edges)
    for name, gradient in zip(("query", "key", "value"), gradients, strict=False):
        assert torch.equal(hooks[name][0], x.flatten(0, 1))
        assert torch.equal(hooks[name][1], gradient.flatten(0, 1))


@pytest.mark.parametrize("arg", ["query", "key", "value"])
def test_one_argument_is_captured_where_all_are_the_same_tensor(arg: str) -> None:
    attention, x = nn.MultiheadAttention(4, 2, batch_first=True), normal(2, 2, 5, 4)
    names = ("query", "key", "value")
    with register_neuron_hooks(attention, [""], arg=arg, reduce=None) as hooks:
        loss_of(attention(**dict.fromkeys(names, x))[0]).backward()
    edges = {name: x.clone().requires_grad_() for name in names}
    (gradient,) = torch.autograd.grad(loss_of(attention(**edges)[0]), edges[arg])
    torch.testing.assert_close(hooks[""][1], gradient.flatten(0, 1))


def test_a_layer_that_returns_a_dict_of_which_a_part_is_used_is_captured() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, *, hidden: Tensor, scale: float = 1.0) -> dict[str, Tensor | None]:
            return {"one": scale * self.one(hidden), "other": self.other(hidden), "cache": None}

    heads, x = Heads(), normal(3, 5, 4)
    with register_neuron_hooks(heads, ["", "one"], arg="hidden", reduce=None) as hooks, pytest.raises(NeuronHookError):
        # The linear layer has no argument of that name.
        heads(hidden=x)
    with register_neuron_hooks(heads, [""], arg="hidden", reduce=None) as hooks:
        loss_of(heads(hidden=x, scale=2.0)["one"]).backward()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(heads(hidden=leaf, scale=2.0)["one"]), leaf)
    assert torch.equal(hooks[""], torch.stack((x, gradient)))


# Other modules, autocast


class Residual(nn.Module):
    """A block of a residual network, whose activations work in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.relu, self.head = nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Linear(3, 2)

    def forward(self, x: Tensor, taps: tuple[Tensor, Tensor] | None = None) -> Tensor:
        first, second = taps or (0, 0)
        out = self.conv2(self.relu(self.norm(self.conv1(x))) + second)
        out += x + first
        return self.head(self.relu(out).mean((-2, -1)))


def test_a_residual_network_that_works_in_place_is_captured() -> None:
    net, x = Residual().eval(), normal(4, 2, 3, 5, 5)
    with register_neuron_hooks(net, ["conv2", "head"], reduce=None) as hooks:
        loss_of(net(x)).backward()
    zeros = torch.zeros_like(x), torch.zeros_like(x, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_of(net(x, zeros)), zeros[1])
    activation = net.norm(net.conv1(x)).relu().detach()
    expected = torch.stack([tensor.movedim(1, -1).flatten(0, -2) for tensor in (activation, gradient)])
    torch.testing.assert_close(hooks["conv2"], expected)
    assert hooks["head"].shape == (2, 2, 3)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_the_input_of_a_recurrent_layer_is_captured(kind: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(4, 6), kind(6, 3, num_layers=2, batch_first=True))
    assert_retained(net, ["1"], lambda: net(normal(5, 2, 7, 4))[0])


def test_a_packed_sequence_is_refused() -> None:
    layer = nn.LSTM(4, 3)
    register_neuron_hooks(layer)
    with pytest.raises(NeuronHookError, match="Argument 0 of layer '' is a PackedSequence, expected a floating-point"):
        layer(nn.utils.rnn.pack_sequence([normal(6, 5, 4)]))


def test_a_projection_that_attention_uses_without_calling_it_raises_at_reading() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    with register_neuron_hooks(layer) as hooks:
        layer(normal(7, 2, 5, 4)).sum().backward()
        assert hooks["linear2"].shape == (8,)
        with pytest.raises(NeuronHookError, match="'self_attn.out_proj' was never called.*uses the weight and not"):
            hooks["self_attn.out_proj"]


def test_autocast_is_captured_in_the_dtype_of_the_input() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 3))

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(normal(8, 5, 4))

    assert_retained(net, ["1", "2"], run)


# What hooks cost


def assert_nothing_more_is_kept(case: Case) -> None:
    """A forward under hooks keeps the same bytes for its backward, counted once per storage."""
    sizes = []
    for hooked in (False, True):
        net, kept = case.network(), {}

        def keep(tensor: Tensor, kept: dict[int, torch.UntypedStorage] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        hooks = register_neuron_hooks(net, "down") if hooked else nullcontext()
        with hooks, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net(case.inputs())
        sizes.append(sum(storage.nbytes() for storage in kept.values()))
    assert sizes[0] == sizes[1]


@given(case=cases.filter(lambda case: case.checkpointing == "off" and not case.frozen))
def test_hooks_keep_no_tensor_that_autograd_does_not_keep_anyway(case: Case) -> None:
    assert_nothing_more_is_kept(case)


def test_the_law_tells_hooks_that_keep_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InputTap, "copies", property(lambda tap: True, lambda tap, copies: None), raising=False)
    with pytest.raises(AssertionError):
        assert_nothing_more_is_kept(PLAIN)


# Compilers and transforms


class Broken(nn.Module):
    """A network with a graph break, whose last layer runs outside of the graph or inside."""

    def __init__(self, outside: bool) -> None:
        super().__init__()
        self.first, self.last, self.outside = nn.Linear(4, 6), nn.Linear(6, 2), outside

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if self.outside:
            return self.eager(hidden)
        torch._dynamo.graph_break()
        return self.last(hidden)

    @torch.compiler.disable
    def eager(self, hidden: Tensor) -> Tensor:
        return self.last(hidden)


def test_a_layer_outside_the_compiled_graph_is_captured() -> None:
    net, x = Broken(outside=True), normal(9, 3, 4)
    with register_neuron_hooks(net, reduce=None) as hooks:
        loss_of(torch.compile(net, backend="eager")(x)).backward()
        with pytest.raises(NeuronHookError, match=r"'first' was never called.*torch.compile, whose code runs no hooks"):
            hooks["first"]
    with retained(net, ["last"]) as expected:
        loss_of(net(x)).backward()
    torch.testing.assert_close(hooks["last"], torch.stack(expected["last"]))


# The compiler looks at `.grad` of what crosses the break, and hides the warning from users.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_graph_break_does_not_make_compiled_layers_run_hooks() -> None:
    net = Broken(outside=False)
    with register_neuron_hooks(net) as hooks:
        loss_of(torch.compile(net, backend="eager")(normal(9, 3, 4))).backward()
        for name in ("first", "last"):
            with pytest.raises(NeuronHookError, match="never called.*torch.compile, whose code runs no hooks"):
                hooks[name]


def test_function_transforms_refuse_hooks_loudly() -> None:
    net = nn.Linear(4, 2)
    with register_neuron_hooks(net), pytest.raises(RuntimeError, match="functorch transforms.*setup_context"):
        torch.func.grad(lambda x: net(x).sum())(torch.ones(3, 4))


# Code that writes on what was captured


def test_a_layer_that_changes_its_input_without_saying_so_is_loud() -> None:
    class Secret(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_()

    net = nn.Sequential(nn.Linear(4, 3), Secret())
    with register_neuron_hooks(net, ["1"]), pytest.raises(RuntimeError, match="_Tap.* is a view and is being modified"):
        net(torch.ones(2, 4))


def test_an_input_that_is_changed_after_the_layer_has_read_it_is_loud() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    hidden = normal(10, 2, 4).requires_grad_() * 1
    with register_neuron_hooks(layer) as hooks:
        out = layer(hidden)
        hidden += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (out + hidden).sum().backward()
        with pytest.raises(NeuronHookError, match="no backward reached it"):
            hooks[""]


def test_calls_with_another_number_of_neurons_raise() -> None:
    relu = nn.ReLU()
    with register_neuron_hooks(relu, reduce=None):
        relu(torch.ones(2, 3)).sum().backward()
        with pytest.raises(NeuronHookError, match="call of layer '' has 4 neurons, expected 3 as before"):
            relu(torch.ones(2, 4)).sum().backward()
