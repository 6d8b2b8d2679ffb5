"""Run a model with one layer's input replaced, and leave the model as it was found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from torch_simu._checks import problem


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
def replaced_input(
    name: str, module: nn.Module, streams: int, tokens: int, replace: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Replace the input of `module` in the forward pass inside the block.

    Args:
        name: The layer's name, for messages.
        module: The layer; it must be called exactly once, with every token.
        streams: Rows that the layer should see.
        tokens: Tokens per row that the layer should see.
        replace: From the clean input to the new one. Shapes: `(streams, tokens, num_neurons)` both, though the new one
            may have more streams.

    Raises:
        ValueError: If the layer is not called once with `streams * tokens` tokens.
    """
    calls = 0

    def hook(_: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        nonlocal calls
        calls += 1
        found = args[0] if args else None
        if calls > 1 or not isinstance(found, Tensor) or found[..., 0].numel() != streams * tokens:
            shape = tuple(found.shape) if isinstance(found, Tensor) else "no tensor"
            wrong = f"Call {calls} of layer {name!r} in one pass has input shape {shape}"
            raise ValueError(problem(wrong, f"one call with {streams} x {tokens} tokens", "Leave the layer out."))
        # OPT and some mixtures of experts merge rows and tokens into one dimension.
        new = replace(found.reshape(streams, tokens, found.shape[-1]))
        return (new.flatten(0, 1) if found.dim() == 2 else new, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if calls == 0:
        raise ValueError(problem(f"Layer {name!r} is not used in the forward pass", "one call", "Leave it out."))


@contextmanager
def recorded_inputs(layers: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield a mapping that the next forward pass fills with each layer's input."""
    inputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in layers.items():

            def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                inputs[name] = args[0].detach()

            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield inputs


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
