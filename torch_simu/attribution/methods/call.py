"""Call: what a model's forward pass takes, on which device, the logits that it gives, and its text configuration."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn


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


def text_config(model: nn.Module) -> object:
    """Return the configuration of the model's language part, which multimodal ones keep inside; None: there is none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def device_of(model: nn.Module) -> torch.device:
    """Return the device that the model's inputs belong on: that of its first weight with data."""
    found = getattr(model, "device", None)
    if isinstance(found, torch.device) and found.type != "meta":
        return found
    # Weights that are offloaded are on none that computes.
    return next(param.device for param in model.parameters() if not param.is_meta)
