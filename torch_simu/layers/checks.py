"""What a layer must be before its neurons are trained: of the size the selection counts, with a weight of its own."""

from __future__ import annotations

from torch import nn

from torch_simu._checks import problem
from torch_simu.layers.kinds import num_neurons


def check_num_neurons(name: str, layer: nn.Module, counted: int) -> None:
    """Raise when a layer has another number of neurons than its selection counts.

    Raises:
        ValueError: If it has.
    """
    if (size := num_neurons(layer)) != counted:
        wrong = f"Layer {name!r} has {size} neurons, the selection counts {counted}"
        raise ValueError(problem(wrong, "the same model", "Was the selection made on another model?"))


def check_unshared(model: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Raise when another layer of the model has the same weight.

    Raises:
        ValueError: If one has.
    """
    for other, module in model.named_modules():
        if other != name and any(param is weight for param in module.parameters(recurse=False)):
            raise ValueError(problem(f"Layers {name!r} and {other!r} share one weight", "a weight per layer"))
