"""Find the projections by behavior: what mixes positions is attention, what does not is an MLP."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.layers.kinds import d_model, has_neurons, is_fused_experts, is_neuron_layer

_LENGTH = 8
_MOVED = 1e-6


@dataclass(slots=True, eq=False)
class _Call:
    """What a child of a block was called with, and the layers inside it in the order of their calls."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layers: list[str] = field(default_factory=list)


def probed_projections(model: nn.Module) -> tuple[set[str], set[str]]:
    """Return the names of the down projections and of the attention projections, found by one short forward pass.

    Each child of a block is called again with its first token changed. Where later tokens move, its linear layers are
    attention projections, unless it mixes by a convolution or a recurrence; where none does, the last one that is
    called is a down projection (or the fused experts are). A child that holds such a child beside others is a block
    itself, as one that several layers share.

    Args:
        model: A causal language model whose blocks are in a `ModuleList`.

    Raises:
        ValueError: If the model has no such blocks, or cannot be run on token ids.
    """
    blocks = _blocks(model)
    names = {module: name for name, module in model.named_modules()}
    groups = [_children(block) for block in blocks]
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            inner = [part for group in groups for child in group for part in _children(child)]
            calls = _recorded(model, [child for group in groups for child in group] + inner, names)
            down: set[str] = set()
            attention: set[str] = set()
            for group in groups:
                token_wise = []
                for child in _flat(group, calls):
                    if not _mixes(child, calls[child]):
                        token_wise.append(calls[child].layers)
                    elif _attends(model, child, calls[child]):
                        attention.update(calls[child].layers)
                down |= _down(model, token_wise)
    finally:
        for module in training:
            module.training = True
    return down, attention


def _blocks(model: nn.Module) -> nn.ModuleList:
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and "expert" not in name:
            return module
    wrong = f"No ModuleList of {type(model).__name__} has as many modules as its num_hidden_layers, {count}"
    raise ValueError(problem(wrong, "the blocks of the model", "Name the layers with a pattern."))


def _children(block: nn.Module) -> list[nn.Module]:
    """The parts of a block that are called with hidden states; a part that only wraps another gives its place to it."""
    found = []
    for child in block.children():
        inner = list(child.children())
        found.append(child if len(inner) != 1 or is_neuron_layer(child) else inner[0])
    return found


def _flat(group: list[nn.Module], calls: dict[nn.Module, _Call]) -> list[nn.Module]:
    """The children that hold layers, with those of a block that stands among them in its place."""
    found = []
    for child in filter(lambda each: each in calls and calls[each].layers, group):
        parts = [part for part in _children(child) if part in calls and len(calls[part].layers) > 1]
        nested = len(parts) > 1 and _mixes(child, calls[child]) and any(_mixes(part, calls[part]) for part in parts)
        found += parts if nested else [child]
    return found


def _recorded(model: nn.Module, children: list[nn.Module], names: dict[nn.Module, str]) -> dict[nn.Module, _Call]:
    calls: dict[nn.Module, _Call] = {}
    inside: dict[nn.Module, list[nn.Module]] = {}
    for child in dict.fromkeys(children):
        for layer in filter(has_neurons, child.modules()):
            inside.setdefault(layer, []).append(child)

    def called(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(child, _Call(args, kwargs))

    def layer_called(layer: nn.Module, *_: object) -> None:
        for child in filter(calls.__contains__, inside[layer]):
            calls[child].layers.append(names[layer])

    embeddings = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    size, device = (embeddings.num_embeddings, embeddings.weight.device) if embeddings else (0, torch.device("cpu"))
    if size < 2 or device.type == "meta":
        wrong = f"{type(model).__name__} has no token embeddings that it could be run with"
        raise ValueError(problem(wrong, "a model with its weights", "Name the layers with a pattern."))
    ids = torch.randint(1, size, (1, _LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    with ExitStack() as stack:
        for child in dict.fromkeys(children):
            stack.callback(child.register_forward_pre_hook(called, with_kwargs=True).remove)
        # After those of the children: a layer that is itself a child is recorded in its own call.
        for layer in inside:
            stack.callback(layer.register_forward_pre_hook(layer_called).remove)
        model(input_ids=ids)
    return calls


def _mixes(child: nn.Module, call: _Call) -> bool:
    """Say whether later tokens of the output move with the first token of the input."""
    kwargs = {key: None if "past" in key or "cache" in key else value for key, value in call.kwargs.items()}
    kwargs = {key: False if key == "use_cache" else value for key, value in kwargs.items()}
    clean = _output(child(*call.args, **kwargs))
    changed = False

    def moved(value: object) -> object:
        nonlocal changed
        if changed or not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            return value
        if value.shape[-2] != _LENGTH:
            return value
        changed = True
        draw = torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(1))
        new = value.clone()
        new[..., 0, :] += draw.to(new)
        return new

    args = tuple(map(moved, call.args))
    after = _output(child(*args, **{key: moved(value) for key, value in kwargs.items()}))
    tokens = clean.reshape(_LENGTH, -1)[1:].float(), after.reshape(_LENGTH, -1)[1:].float()
    return bool((tokens[0] - tokens[1]).abs().max() > _MOVED * tokens[0].abs().max())


def _attends(model: nn.Module, child: nn.Module, call: _Call) -> bool:
    """Say whether a part that mixes positions is attention whose weights are all in its linear layers."""
    # Convolutions have parameters of three dimensions, and so have recurrences and projections fused by experts.
    if any(param.dim() > 2 for param in child.parameters()):
        return False
    # In a model that also has a recurrent state.
    return not getattr(model, "_is_stateful", False) or any("mask" in key for key in call.kwargs)


def _output(value: object) -> Tensor:
    while not isinstance(value, Tensor):
        assert isinstance(value, tuple | list)
        value = value[0]
    return value


def _down(model: nn.Module, token_wise: list[list[str]]) -> set[str]:
    """The last layer of each token-wise child that gives hidden states; without a container, the last of the block."""
    if not token_wise:
        return set()
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    gives: Callable[[str], bool] = lambda name: d_model(model.get_submodule(name)) == width  # noqa: E731
    experts = {name for layers in token_wise for name in layers if is_fused_experts(model.get_submodule(name))}
    # Beside an MLP of several layers a lone one is glue, as behind a block that others share.
    groups = [layers for layers in token_wise if len(layers) > 1]
    found = set(experts)
    for group in groups or [[name for layers in token_wise for name in layers]]:
        dense = [name for name in group if name not in experts and gives(name)]
        # A router or a gate of shared experts has one output, or one for each expert, and comes before.
        found |= {*dense[-1:]}
    return found
