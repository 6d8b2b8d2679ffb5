"""NeuronSelection: which neurons of which layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_simu._checks import check_count, check_number, problem
from torch_simu._files import load_tensors, save_tensors
from torch_simu.bitsandbytes.packing import codes_as_loaded, keep_codes_as_loaded
from torch_simu.layers import Selector, neuron_groups, num_neurons, select_layers

_KIND = "NeuronSelection"


class NeuronSelection(Mapping[str, Tensor]):
    """Which neurons of which layers: sorted, without duplicates, checked, immutable.

    A layer is a name from `model.named_modules()`; a neuron is one input feature of that layer. A layer of
    `num_neurons` that `neurons` leaves out has no selected neuron. Selections are equal, and hash equally, when their
    content is. `a | b`, `a & b` and `a - b` are the set operations, layer by layer.

    Args:
        neurons: Layer -> indices, in any order, duplicates allowed.
        num_neurons: Layer -> how many neurons the layer has.

    Raises:
        ValueError: If an index is out of bounds, a layer has no size, or a size is not positive.
        TypeError: If an index is not a whole number, or the neurons of a layer are not iterable.

    Examples:
        >>> selection = NeuronSelection({"mlp": [3, 1, 3]}, {"mlp": 4})
        >>> selection["mlp"]
        tensor([1, 3])
        >>> selection.mask("mlp")
        tensor([False,  True, False,  True])
        >>> selection.fraction
        0.5
    """

    __slots__ = ("_indices", "_num_neurons")

    def __init__(self, neurons: Mapping[str, Iterable[int] | Tensor], num_neurons: Mapping[str, int]) -> None:
        sizes = {layer: check_count(f"num_neurons[{layer!r}]", size) for layer, size in num_neurons.items()}
        for layer in neurons:
            if layer not in sizes:
                raise ValueError(
                    problem(f"Layer {layer!r} has neurons but no size", f"num_neurons for each of {list(neurons)}")
                )
        self._num_neurons: Mapping[str, int] = MappingProxyType(sizes)
        self._indices: dict[str, tuple[int, ...]] = {
            layer: checked_indices(layer, neurons.get(layer, ()), size) for layer, size in sizes.items()
        }

    @classmethod
    def from_masks(cls, masks: Mapping[str, Tensor]) -> NeuronSelection:
        """Select the neurons whose entry is True.

        Args:
            masks: Layer -> bool tensor. Shape of each: `(num_neurons,)`.

        Raises:
            ValueError: If a mask is not a 1-D bool tensor.
        """
        for layer, mask in masks.items():
            if mask.dtype != torch.bool or mask.dim() != 1:
                wrong = f"The mask of layer {layer!r} has dtype {mask.dtype} and shape {tuple(mask.shape)}"
                raise ValueError(problem(wrong, "a 1-D bool tensor"))
        indices = {layer: mask.nonzero()[:, 0] for layer, mask in masks.items()}
        return cls(indices, {layer: mask.numel() for layer, mask in masks.items()})

    @classmethod
    def full(cls, model: nn.Module, select: Selector | None = None) -> NeuronSelection:
        """Select every neuron of the layers (`select` as in `torch_simu.layers.select_layers`)."""
        sizes = {name: num_neurons(module) for name, module in select_layers(model, select).items()}
        return cls({name: range(size) for name, size in sizes.items()}, sizes)

    @classmethod
    def random(
        cls, model: nn.Module, fraction: float, generator: torch.Generator | None = None, select: Selector | None = None
    ) -> NeuronSelection:
        """Select the same fraction of neurons in each layer at random.

        Args:
            model: The model whose layers are meant.
            fraction: Share of each layer's neurons, rounded to the nearest count.
            generator: Source of randomness, on the CPU.
            select: Which layers, as in `torch_simu.layers.select_layers`; None: the MLP down projections.

        Raises:
            ValueError: If `fraction` is not between 0 and 1.
        """
        check_number("fraction", fraction, high=1.0)
        sizes = {name: num_neurons(module) for name, module in select_layers(model, select).items()}
        neurons = {
            name: torch.randperm(size, generator=generator)[: round(fraction * size)] for name, size in sizes.items()
        }
        return cls(neurons, sizes)

    @property
    def num_neurons(self) -> Mapping[str, int]:
        """Layer -> how many neurons it has."""
        return self._num_neurons

    @property
    def num_selected(self) -> int:
        """How many neurons are selected, over all layers."""
        return sum(map(len, self._indices.values()))

    @property
    def fraction(self) -> float:
        """Share of all neurons that is selected."""
        return self.num_selected / max(1, sum(self._num_neurons.values()))

    def mask(self, layer: str) -> Tensor:
        """Return a new bool tensor with True at the selected neurons. Shape: `(num_neurons,)`."""
        mask = torch.zeros(self._num_neurons[self._known(layer)], dtype=torch.bool)
        mask[self[layer]] = True
        return mask

    def __getitem__(self, layer: str) -> Tensor:
        """Return the sorted indices of a layer as a new int64 tensor. Shape: `(num_selected,)`."""
        return torch.tensor(self._indices[self._known(layer)], dtype=torch.int64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __contains__(self, layer: object) -> bool:
        return layer in self._indices

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronSelection):
            return NotImplemented
        return self._num_neurons == other._num_neurons and self._indices == other._indices

    def __hash__(self) -> int:
        return hash((frozenset(self._num_neurons.items()), frozenset(self._indices.items())))

    def __repr__(self) -> str:
        total = sum(self._num_neurons.values())
        share = f"{self.num_selected} of {total} neurons, {100 * self.fraction:.3g} %"
        return f"NeuronSelection({len(self)} layers, {share})"

    def __or__(self, other: NeuronSelection) -> NeuronSelection:
        return self._combined(other, set.union)

    def __and__(self, other: NeuronSelection) -> NeuronSelection:
        return self._combined(other, set.intersection)

    def __sub__(self, other: NeuronSelection) -> NeuronSelection:
        return self._combined(other, set.difference)

    def __reduce__(self) -> tuple[type[NeuronSelection], tuple[dict[str, tuple[int, ...]], dict[str, int]]]:
        return NeuronSelection, (self._indices, dict(self._num_neurons))

    def param_groups(
        self, model: nn.Module, attention: Literal["full", "frozen"] = "frozen", units: bool = False
    ) -> list[dict[str, object]]:
        """Return groups for `SIMUOptimizer`, and set `requires_grad` so that nothing else trains.

        Args:
            model: The model the selection was made on.
            attention: "frozen" leaves the attention projections alone; "full" trains them whole, which is the paper's
                form.
            units: Whether the rows that make the selected neurons train, too: those of the gate and up projections,
                with their entries of the biases. A short run proves which they are.

        Returns:
            One group per layout of the weights (see `torch_simu.layers.neuron_dim`) with the keys `params`, `neurons`
            (aligned with `params`) and `neuron_dim`, one for the attention projections, and with `units` one per layout
            of what makes the neurons, marked by `rows`: its `neurons` are outputs.

        Raises:
            KeyError: If a layer is not in the model.
            TypeError: If a layer is of another kind, or belongs to another quantizer (`check_weight` of
                `torch_simu.layers`).
            ValueError: If a layer has another number of neurons, shares its weight with another layer, holds quantized
                codes, which cannot be trained in place, or is an attention projection that "full" trains whole; if its
                weight is computed from other parameters or has no data (meta device, as of offloaded layers); if 4-bit
                codes of the model were packed for inference; with `units`, if what makes the neurons is not proved.
        """
        # A run without gradients would pack 4-bit codes elsewhere in the model.
        with codes_as_loaded(model) if units else nullcontext():
            groups = neuron_groups(model, self._indices, self._num_neurons, attention, units=units)
        # The gradient of these weights goes through any 4-bit layers behind them, also after an evaluation.
        keep_codes_as_loaded(model)
        model.requires_grad_(False)
        for group in groups:
            for param in cast("list[nn.Parameter]", group["params"]):
                param.requires_grad_(True)
        return groups

    def save(self, path: str | Path) -> None:
        """Write the selection to `path` (safetensors with a JSON header), whole or not at all."""
        tensors = {layer: self[layer] for layer in self}
        save_tensors(path, _KIND, tensors, {"num_neurons": dict(self._num_neurons)})

    @classmethod
    def load(cls, path: str | Path) -> NeuronSelection:
        """Read a selection that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or holds something else.
        """
        tensors, header = load_tensors(path, _KIND)
        try:
            return cls(tensors, cast("dict[str, int]", header["num_neurons"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            wrong = f"File {str(path)!r} holds no consistent selection ({error})"
            raise ValueError(problem(wrong, "what NeuronSelection.save wrote", "The file is damaged.")) from None

    @staticmethod
    def broadcast(
        selection: NeuronSelection | None, src: int = 0, group: dist.ProcessGroup | None = None
    ) -> NeuronSelection:
        """Return the selection of one process in all of them, so that none goes by scores that differ in a last bit.

        Args:
            selection: The selection in process `src`; ignored in the others.
            src: Its global rank.
            group: The processes; None: all.

        Raises:
            ValueError: If `src` has none.
        """
        device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        content = b""
        if dist.get_rank() == src and selection is not None:
            neurons = {layer: list(selection._indices[layer]) for layer in selection}
            content = json.dumps([neurons, dict(selection._num_neurons)]).encode()
        length = torch.tensor([len(content)], device=device)
        dist.broadcast(length, src, group=group)
        if not length.item():
            raise ValueError(problem(f"Process {src} has no selection to broadcast", "one", "Pass it there."))
        received = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
        if content:
            received.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(received, src, group=group)
        return NeuronSelection(*json.loads(bytes(received.tolist())))

    def _combined(self, other: NeuronSelection, combine: Callable[[set[int], set[int]], set[int]]) -> NeuronSelection:
        if not isinstance(other, NeuronSelection):
            return NotImplemented
        for layer in self._num_neurons.keys() & other._num_neurons.keys():
            if self._num_neurons[layer] != other._num_neurons[layer]:
                wrong = f"Layer {layer!r} has {self._num_neurons[layer]} and {other._num_neurons[layer]} neurons"
                raise ValueError(problem(wrong, "selections of the same model"))
        sizes = {**self._num_neurons, **other._num_neurons}
        neurons = {
            layer: combine(set(self._indices.get(layer, ())), set(other._indices.get(layer, ()))) for layer in sizes
        }
        return NeuronSelection(neurons, sizes)

    def _known(self, layer: str) -> str:
        if layer not in self._indices:
            raise KeyError(problem(f"Layer {layer!r} is not in the selection", f"one of {list(self._indices)}"))
        return layer


def checked_indices(layer: str, indices: Iterable[int] | Tensor, size: int) -> tuple[int, ...]:
    """Return the indices of a layer of `size` neurons, sorted and without duplicates.

    Raises:
        ValueError: If one is out of bounds.
        TypeError: If one is not a whole number, or they are not iterable.
    """
    if isinstance(indices, Tensor):
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            advice = "Use NeuronSelection.from_masks for masks." if indices.dtype == torch.bool else ""
            raise TypeError(problem(f"The neurons of layer {layer!r} are {indices.dtype}", "whole numbers", advice))
        values = sorted(set(indices.flatten().tolist()))
    elif not isinstance(indices, Iterable) or isinstance(indices, str | bytes):
        raise TypeError(problem(f"The neurons of layer {layer!r} are {indices!r}", "an iterable of whole numbers"))
    else:
        # Checked before they meet in a set, where True and 1 are the same.
        found = list(indices)
        if wrong := [index for index in found if isinstance(index, bool) or not hasattr(index, "__index__")]:
            raise TypeError(problem(f"Layer {layer!r} selects neuron {wrong[0]!r}", "whole numbers"))
        values = sorted({index.__index__() for index in found})
    if values and (values[0] < 0 or values[-1] >= size):
        index = values[0] if values[0] < 0 else values[-1]
        wrong_index = f"Layer {layer!r} selects neuron {index}"
        raise ValueError(problem(wrong_index, f"0 <= index < {size}", "Was the selection made on another model?"))
    return tuple(values)
