"""Run a model for attribution, and leave it as it was found."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode without trainable parameters, and restore both on the way out."""
    training = [module for module in model.modules() if module.training]
    trainable = [param for param in model.parameters() if param.requires_grad]
    try:
        for module in training:
            module.training = False
        for param in trainable:
            param.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for param in trainable:
            param.requires_grad_(True)


@contextmanager
def recorded_ranks(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Yield a mapping that the next forward pass fills with the number of dimensions of each layer's input."""
    ranks: dict[str, int] = {}
    with ExitStack() as stack:
        for name, module in layers.items():

            def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                ranks[name] = args[0].dim()

            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield ranks


def logits_at(model: nn.Module, positions: Tensor, **inputs: object) -> Tensor:
    """Return the model's logits at some positions, computing no others where the model can.

    Args:
        model: A causal language model.
        positions: Positions of the sequence. Shape: `(num_positions,)`.
        inputs: Arguments of the model.

    Returns:
        Logits. Shape: `(batch, num_positions, vocabulary)`.
    """
    if accepts(model, "logits_to_keep"):
        inputs["logits_to_keep"] = positions
    logits = model(**inputs).logits
    return cast("Tensor", logits if logits.shape[1] == positions.numel() else logits[:, positions])


def accepts(model: nn.Module, argument: str) -> bool:
    """Say whether the model's forward pass names the argument."""
    return argument in inspect.signature(model.forward).parameters


def device_of(model: nn.Module) -> torch.device:
    """Return the device that the model's inputs belong on."""
    found = getattr(model, "device", None)
    return found if isinstance(found, torch.device) else next(model.parameters()).device
