"""Find the projections by behavior: what mixes positions is attention, what does not is an MLP."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import chain
from typing import Any

from torch import nn

from torch_simu._checks import problem
from torch_simu.layers.kinds import d_model, has_neurons, is_fused_experts, is_neuron_layer
from torch_simu.layers.replay import NUM_TOKENS, Call, drawn_tokens, evaluated, is_hidden, mixes, untold


def probed_projections(model: nn.Module) -> tuple[set[str], set[str]]:
    """Return the names of the down projections and of the attention projections, found by one short forward pass.

    Each part of a block is called again with its first token changed. Where later tokens move, its linear layers are
    attention projections, unless it mixes by a convolution or a recurrence; where none does, the last one that is
    called is a down projection, if what it gets is a nonlinear function of the part's input, and so are fused experts.
    A part that holds such a part beside others is a block itself, as one that several layers share. In a mixture of
    experts that holds for each MLP inside it.

    Args:
        model: A causal language model whose blocks, or the parts of its blocks, are in a `ModuleList`.

    Raises:
        ValueError: If the model has no such blocks, cannot be run on token ids, or a part is not known by its behavior.
    """
    blocks = _blocks(model)
    names = {module: name for name, module in model.named_modules()}
    with evaluated(model):
        parts = [part for _, group in blocks for part in group]
        inner = [part for each in parts for part in _children(each)]
        calls = _recorded(model, [*(block for block, _ in blocks), *parts, *inner], names)
        down: set[str] = set()
        attention: set[str] = set()
        for block, group in blocks:
            token_wise = []
            for part in _flat(group, calls):
                if not mixes(part, calls[part]):
                    token_wise.append(part)
                elif _attends(model, part, calls[part]):
                    attention.update(calls[part].layers)
            down |= _down(model, block, token_wise, calls)
    return down, attention


def _blocks(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """The blocks and their parts; of a model that lists its parts kind by kind, the model and those at one place."""
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists: dict[str, list[nn.ModuleList]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and "expert" not in name:
            inside = any(module is each for each in chain(*map(nn.Module.modules, chain(*lists.values()))))
            if not inside and any(map(has_neurons, module.modules())):
                lists.setdefault(name.rpartition(".")[0], []).append(module)
    blocks: list[tuple[nn.Module, list[nn.Module]]] = []
    for parent, found in lists.items():
        if len(found) == 1:
            blocks += [(block, _children(block)) for block in found[0]]
        else:
            blocks += [(model.get_submodule(parent), [*map(_unwrapped, parts)]) for parts in zip(*found, strict=True)]
    if blocks:
        return blocks
    wrong = f"No ModuleList of {type(model).__name__} has as many modules as its num_hidden_layers, {count}"
    raise ValueError(problem(wrong, "the blocks of the model", "Name the layers with a pattern."))


def _children(block: nn.Module) -> list[nn.Module]:
    """The parts of a block that are called with hidden states."""
    return [*map(_unwrapped, block.children())]


def _unwrapped(part: nn.Module) -> nn.Module:
    """The part itself; one that only wraps another gives its place to it."""
    inner = list(part.children())
    return part if len(inner) != 1 or is_neuron_layer(part) else inner[0]


def _flat(group: list[nn.Module], calls: dict[nn.Module, Call]) -> list[nn.Module]:
    """The parts that hold layers, with those of a block that stands among them in its place."""
    found = []
    for child in filter(lambda each: each in calls and calls[each].layers, group):
        parts = [part for part in _children(child) if part in calls and len(calls[part].layers) > 1]
        nested = len(parts) > 1 and mixes(child, calls[child]) and any(mixes(part, calls[part]) for part in parts)
        found += parts if nested else [child]
    return found


def _recorded(model: nn.Module, children: list[nn.Module], names: dict[nn.Module, str]) -> dict[nn.Module, Call]:
    calls: dict[nn.Module, Call] = {}
    inside: dict[nn.Module, list[nn.Module]] = {}
    for child in dict.fromkeys(children):
        for layer in filter(has_neurons, child.modules()):
            inside.setdefault(layer, []).append(child)

    def called(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(child, Call(args, kwargs))

    def layer_called(layer: nn.Module, *_: object) -> None:
        for child in filter(calls.__contains__, inside[layer]):
            if names[layer] not in calls[child].layers:
                calls[child].layers.append(names[layer])

    ids = drawn_tokens(model, 1, NUM_TOKENS)
    if ids is None:
        wrong = f"{type(model).__name__} has no token embeddings that it could be run with"
        raise ValueError(problem(wrong, "a model with its weights", "Name the layers with a pattern."))
    with ExitStack() as stack:
        for child in dict.fromkeys(children):
            stack.callback(child.register_forward_pre_hook(called, with_kwargs=True).remove)
        # After those of the children: a layer that is itself a child is recorded in its own call.
        for layer in inside:
            stack.callback(layer.register_forward_pre_hook(layer_called).remove)
        model(input_ids=ids)
    return calls


def _attends(model: nn.Module, child: nn.Module, call: Call) -> bool:
    """Say whether a part that mixes positions is attention whose weights are all in its linear layers."""
    # Convolutions have parameters of three dimensions, and so have recurrences and projections fused by experts.
    if any(param.dim() > 2 for param in child.parameters()):
        return False
    # In a model that also has a recurrent state.
    return not getattr(model, "_is_stateful", False) or any("mask" in key for key in call.kwargs)


def _down(model: nn.Module, block: nn.Module, token_wise: list[nn.Module], calls: dict[nn.Module, Call]) -> set[str]:
    """The down projection of each token-wise part; without a part that holds several layers, that of the block."""
    # Beside an MLP of several layers a lone one is glue, as behind a block that others share.
    found: set[str] = set()
    parts = [part for part in token_wise if len(calls[part].layers) > 1]
    for part in parts:
        found |= _of_part(model, part, part, calls[part])
    lone = [layer for part in token_wise for layer in calls[part].layers]
    found |= {layer for layer in lone if is_fused_experts(model.get_submodule(layer))}
    if not parts and (last := _last(model, lone)):
        before = [model.get_submodule(layer) for layer in lone[: lone.index(last)]]
        if before and block not in calls:
            raise untold(block)
        if before and is_hidden(model.get_submodule(last), block, calls[block], before):
            found.add(last)
    return found


def _of_part(model: nn.Module, inner: nn.Module, part: nn.Module, call: Call) -> set[str]:
    """The down projections of a token-wise part, or of what is inside it where that holds several MLPs."""
    held = {id(module) for module in inner.modules()}
    layers = [layer for layer in call.layers if id(model.get_submodule(layer)) in held]
    if not any(is_fused_experts(model.get_submodule(layer)) for layer in layers):
        # Which experts are called depends on the tokens, and they are not told from what else they are beside.
        if any(len(_layers(each)) > 1 and _gives(model, each) for each in _listed(inner)):
            raise untold(part)
        last = _last(model, layers)
        return {last} if last and is_hidden(model.get_submodule(last), part, call) else set()
    # Beside the routed experts: an MLP that every token passes. A lone layer is a router, a gate, or leads to them.
    return {layer for each in inner.children() if len(_layers(each)) > 1 for layer in _of_part(model, each, part, call)}


def _last(model: nn.Module, layers: list[str]) -> str | None:
    """The last of some layers that gives hidden states, which routers and gates do not."""
    return next((layer for layer in reversed(layers) if _gives(model, model.get_submodule(layer))), None)


def _gives(model: nn.Module, part: nn.Module) -> bool:
    """Whether a linear layer of a part, or the part itself, has the width of hidden states."""
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    return any(d_model(layer) == width for layer in _layers(part) if not is_fused_experts(layer))


def _layers(part: nn.Module) -> list[nn.Module]:
    return [*filter(has_neurons, part.modules())]


def _listed(part: nn.Module) -> list[nn.Module]:
    return [each for module in part.modules() if isinstance(module, nn.ModuleList) for each in module]
