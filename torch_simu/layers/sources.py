"""Sources: the projections whose output rows make the neurons that a layer reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.layers.kinds import d_model, is_fused_experts, is_neuron_layer, num_neurons, output_dim
from torch_simu.layers.replay import drawn_tokens, evaluated

_LOW, _HIGH = 0.5, 1.0
"""What outputs are set to: between them every activation function rises."""

_NUM_TOKENS = 2


class Source(NamedTuple):
    """A projection that makes neurons, one output row each, or one in each half where gate and up are one layer.

    Attributes:
        name: Its name.
        layer: The projection.
        num_neurons: How many neurons it makes.
        num_parts: How many rows make one neuron: neuron `i` has rows `i`, `num_neurons + i` and so on.
    """

    name: str
    layer: nn.Module
    num_neurons: int
    num_parts: int

    @property
    def dim(self) -> int:
        """Which dimension of the weight the rows are."""
        return output_dim(self.layer)

    def rows(self, neurons: Iterable[int]) -> list[int]:
        """Return the rows that make some neurons, in order.

        Examples:
            >>> Source("gate_up", nn.Linear(2, 8), num_neurons=4, num_parts=2).rows([1, 3])
            [1, 3, 5, 7]
        """
        chosen = list(neurons)
        return [part * self.num_neurons + neuron for part in range(self.num_parts) for neuron in chosen]


def sources_beside(model: nn.Module, layers: Iterable[str]) -> dict[str, list[Source]]:
    """Return the projections that stand beside layers and have as many outputs as those have neurons, or twice as many.

    They are told by their place and size alone, so the model may be without data; `proved_sources` tells them by what
    they do.

    Args:
        model: Any module.
        layers: Names of layers with neurons.

    Returns:
        Layer -> its sources, one at least, in the order of `model.named_modules()`.

    Raises:
        ValueError: If there is none.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [source.name for source in sources_beside(model, ["2"])["2"]]
        ['0']
    """
    modules = dict(model.named_modules())
    found = {}
    for name in layers:
        if is_fused_experts(modules[name]):
            raise _unknown(name, "are made inside experts that are fused into one parameter")
        parent = name.rpartition(".")[0]
        # Those that one module holds; where the parts of an MLP are modules of their own, as in BERT, one further up.
        near = {key: each for key, each in modules.items() if key != name and key.rpartition(".")[0] == parent}
        up = parent.rpartition(".")[0]
        far = {key: each for key, each in modules.items() if key != name and key.startswith(f"{up}." if up else "")}
        size = num_neurons(modules[name])
        found[name] = _of_size(near, size) or (_of_size(far, size) if parent else [])
        if not found[name]:
            raise _unknown(name, f"are made by no projection beside it with {size} or {2 * size} outputs")
    return found


def proved_sources(model: nn.Module, layers: Iterable[str]) -> dict[str, list[Source]]:
    """Return what makes the neurons of layers, proved by one short run: other rows make other neurons.

    The outputs of all candidates (`sources_beside`) are set to constants. Each neuron must stay the same over tokens
    then, so nothing else makes it, and must change with its own rows and with no other: rows are changed by the bits of
    their number, and by the complement of these.

    Args:
        model: A model that can be run on token ids; one without embeddings is run on hidden states of the width of its
            first layer.
        layers: Names of layers with neurons.

    Returns:
        As `sources_beside`.

    Raises:
        ValueError: If a layer has no such candidates, or the run does not prove them.
    """
    found = sources_beside(model, layers)
    if not found:
        return found
    # One tuple for each (candidate, part, bit, whether the complement is meant), the same for all layers.
    most = max(len(each) * each[0].num_parts for each in found.values())
    num_bits = max(1, max(each[0].num_neurons - 1 for each in found.values()).bit_length())
    trials = [(place, bit, flip) for place in range(most) for bit in range(num_bits) for flip in (False, True)]
    seen: dict[str, Tensor] = {}
    with evaluated(model), ExitStack() as stack:
        modules = dict(model.named_modules())
        for name, sources in found.items():
            parts = [(source, part) for source in sources for part in range(source.num_parts)]
            for source in sources:
                places = [parts.index((source, part)) for part in range(source.num_parts)]
                hook = partial(_set_outputs, trials=trials, places=places)
                stack.callback(source.layer.register_forward_hook(hook).remove)
            see = partial(_see_input, seen=seen, name=name)
            stack.callback(modules[name].register_forward_pre_hook(see).remove)
        try:
            _run(model, 1 + len(trials))
        # Whatever a model does when it is called on tokens alone.
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError) as error:
            raise _unknown(next(iter(found)), f"are not proved: the model cannot be run on tokens ({error})") from error
    for name, sources in found.items():
        if name not in seen or not _is_proved(seen[name], sources, trials):
            names = ", ".join(repr(source.name) for source in sources)
            raise _unknown(name, f"are not proved to be made by the rows of {names}, one by one")
    return found


def proved_rows(model: nn.Module, neurons: Mapping[str, Sequence[int]]) -> list[tuple[Source, list[int]]]:
    """Return each projection that makes neurons of some layers, with its rows that make the selected ones.

    Args:
        model: As in `proved_sources`.
        neurons: Layer -> selected neurons.

    Raises:
        ValueError: As `proved_sources`; or if one projection makes the neurons of two layers.
    """
    made: dict[str, str] = {}
    found = []
    for layer, sources in proved_sources(model, neurons).items():
        for source in sources:
            if made.setdefault(source.name, layer) != layer:
                wrong = f"Layer {source.name!r} makes the neurons of {made[source.name]!r} and of {layer!r}"
                raise ValueError(problem(wrong, "a source for each layer", "Pass units=False."))
            found.append((source, source.rows(neurons[layer])))
    return found


def _of_size(modules: Mapping[str, nn.Module], size: int) -> list[Source]:
    linear = {name: module for name, module in modules.items() if is_neuron_layer(module)}
    single = [Source(name, module, size, 1) for name, module in linear.items() if d_model(module) == size]
    return single or [Source(name, module, size, 2) for name, module in linear.items() if d_model(module) == 2 * size]


def _changed(size: int, bit: int, flip: bool, device: torch.device) -> Tensor:
    """Which of a layer's neurons a trial changes. Shape: `(size,)`."""
    return ((torch.arange(size, device=device) >> bit) % 2 == 1) ^ flip


def _set_outputs(
    _layer: nn.Module,
    _args: tuple[object, ...],
    output: Tensor,
    *,
    trials: Sequence[tuple[int, int, bool]],
    places: Sequence[int],
) -> Tensor:
    rows = torch.full_like(output, _LOW).reshape(1 + len(trials), _NUM_TOKENS, len(places), -1)
    for number, (place, bit, flip) in enumerate(trials, start=1):
        if place in places:
            rows[number, :, places.index(place), _changed(rows.shape[-1], bit, flip, rows.device)] = _HIGH
    return rows.reshape(output.shape)


def _see_input(_layer: nn.Module, args: tuple[Tensor, ...], *, seen: dict[str, Tensor], name: str) -> None:
    seen.setdefault(name, args[0].detach())


def _is_proved(seen: Tensor, sources: Sequence[Source], trials: Sequence[tuple[int, int, bool]]) -> bool:
    size, num_parts = sources[0].num_neurons, len(sources) * sources[0].num_parts
    if seen.numel() != (1 + len(trials)) * _NUM_TOKENS * size:
        return False
    rows = seen.reshape(1 + len(trials), _NUM_TOKENS, size)
    if not torch.equal(rows[:, :1].expand_as(rows), rows):
        return False
    moved = rows[1:, 0] != rows[0, 0]
    expected = [_changed(size, bit, flip, seen.device) & (place < num_parts) for place, bit, flip in trials]
    return torch.equal(moved, torch.stack(expected))


def _run(model: nn.Module, num_rows: int) -> None:
    ids = drawn_tokens(model, num_rows, _NUM_TOKENS)
    if ids is not None:
        model(input_ids=ids)
        return
    first = next(layer for layer in model.modules() if is_neuron_layer(layer))
    hidden = torch.randn(num_rows, _NUM_TOKENS, num_neurons(first), generator=torch.Generator().manual_seed(0))
    # Codes alone take any dtype.
    dtype = next((param.dtype for param in model.parameters() if param.is_floating_point()), torch.float32)
    model(hidden.to(next(model.parameters()).device, dtype))


def _unknown(name: str, why: str) -> ValueError:
    advice = "Train the columns alone: units=False."
    return ValueError(problem(f"The neurons of layer {name!r} {why}", "known sources for units=True", advice))
