"""Low rank: an attacker who trains LoRA matrices beside the layers, as most do who have a quantized model."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from torch_simu._checks import problem

RATE_RATIO = 10.0
"""LoRA learns best at about ten times the rate of all weights (Schulman et al. 2025, "LoRA without regret")."""


def has_peft() -> bool:
    """Say whether PEFT, which makes the matrices, is installed."""
    return importlib.util.find_spec("peft") is not None


def check_peft() -> None:
    """Raise where PEFT is not installed.

    Raises:
        ImportError: If it is not.
    """
    if not has_peft():
        raise ImportError(problem("peft is not installed", "it for LoRA", "Run: pip install peft"))


def why_not(model: PreTrainedModel) -> str:
    """Say why a model cannot be given matrices; nothing where it can."""
    if not has_peft():
        return "peft is not installed"
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not head]
    return "" if layers else "there is no linear layer but the head"


@contextmanager
def low_rank(model: PreTrainedModel, *, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """Put LoRA matrices (Hu et al. 2021, arXiv 2106.09685) beside all linear layers but the head, within the block.

    They begin at a change of zero. Afterwards the model has the layers and trains the parameters that it had before.

    Args:
        model: A model, quantized or not, with deltas or without.
        rank: Inner dimension of the matrices.
        seed: Of their first values; the global generator is left alone.

    Yields:
        The matrices, which alone train inside.

    Raises:
        ImportError: If PEFT is not installed.
    """
    check_peft()
    from peft import LoraConfig, get_peft_model

    flags = [(param, param.requires_grad) for param in model.parameters()]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    with torch.random.fork_rng(), warnings.catch_warnings():
        # Of what it will do when it saves, which is never.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    try:
        yield [param for param in adapted.parameters() if param.requires_grad]
    finally:
        adapted.unload()
        for param, flag in flags:
            param.requires_grad_(flag)
