"""Answers: the log-likelihood of the scored tokens of a batch, with gradients."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from torch_simu._checks import problem
from torch_simu.curvature import IGNORED, scored_logits
from torch_simu.unlearning.objectives.objective import Batch


def mean_answer_nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the mean negative log-likelihood of the scored tokens, in nats per token.

    Args:
        model: A causal language model.
        batch: Tensors on the model's device, as `torch_simu.unlearning.data.examples.collate` makes them.

    Raises:
        ValueError: If no position is scored.
    """
    logits, labels = scored_logits(answer_logits(model, batch), batch["labels"])
    return functional.cross_entropy(_precise(logits), labels)


def answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the logits of a batch. Shape: `(batch, length, vocabulary)`."""
    # Without a cache, which would hold every layer's keys and values through the backward pass.
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits: Tensor = output.logits
    return logits


def answer_log_probs(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every token of a batch, and which of them are scored.

    Args:
        model: A causal language model.
        batch: As in `mean_answer_nll`.

    Returns:
        Log-probabilities in nats, zero where not scored, and a bool mask. Shape of both: `(batch, length - 1)`.

    Raises:
        ValueError: If no position is scored.
    """
    return label_log_probs(answer_logits(model, batch), batch["labels"])


def label_log_probs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every label, and which of them are scored.

    Args:
        logits: Next-token logits. Shape: `(batch, length, vocabulary)`.
        labels: Token ids, -100 where not scored, as in transformers. Shape: `(batch, length)`.

    Returns:
        As `answer_log_probs`.

    Raises:
        ValueError: If no position is scored.
    """
    logits, labels = logits[:, :-1], labels[:, 1:].to(logits.device)
    scored = labels != IGNORED
    if not scored.any():
        raise ValueError(problem("Every label is -100", "at least one scored position"))
    nll = functional.cross_entropy(
        rearrange(_precise(logits), "batch token vocabulary -> (batch token) vocabulary"),
        rearrange(labels, "batch token -> (batch token)"),
        reduction="none",
        ignore_index=IGNORED,
    )
    return -rearrange(nll, "(batch token) -> batch token", batch=len(labels)), scored


def answer_predictions(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the predictions of the scored tokens of a batch, and those tokens.

    Args:
        model: A causal language model.
        batch: As in `mean_answer_nll`.

    Returns:
        Log-probabilities of shape `(num_tokens, vocabulary)`, and token ids of shape `(num_tokens,)`.

    Raises:
        ValueError: If no position is scored.
    """
    logits, labels = scored_logits(answer_logits(model, batch), batch["labels"])
    return _precise(logits).log_softmax(dim=-1), labels


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
