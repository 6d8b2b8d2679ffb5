"""Training: make a small model memorize rows, so that there is something to forget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.optim import AdamW
from transformers import PreTrainedModel

from torch_simu._checks import check_count, check_number, problem
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.metrics.scoring import mode, score_answers
from torch_simu.unlearning.objectives import mean_answer_nll
from torch_simu.unlearning.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a model is made to memorize.

    Args:
        epochs: Passes over the data at most; the learning rate falls to nearly zero over them.
        lr: Largest learning rate of AdamW, after two epochs of warm-up.
        batch_size: Rows per step.
        weight_decay: Decoupled decay.
        em_target: Stop after an epoch whose mean exact memorization of all rows is at least this.
        check_interval: Epochs between two measurements of it.
        seed: Of the batches.

    Raises:
        ValueError: If a value is out of bounds.
    """

    epochs: int = 60
    lr: float = 2e-3
    batch_size: int = 32
    weight_decay: float = 0.01
    em_target: float = 1.0
    check_interval: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "check_interval"):
            check_count(name, getattr(self, name))
        check_number("lr", self.lr, low_open=True)
        check_number("weight_decay", self.weight_decay)
        check_number("em_target", self.em_target, high=1.0)


def memorize(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    config: TrainConfig | None = None,
    pad_id: int = 0,
    progress: Progress | None = None,
) -> float:
    """Train `model` on the answers of `examples` until it has memorized them, in place.

    Args:
        model: A causal language model; every parameter trains.
        examples: Encoded rows.
        config: How to train.
        pad_id: The token id to pad with.
        progress: Told of the stage "train", in steps, with what is known by heart so far and where the training stops.

    Returns:
        The mean exact memorization that was reached, in [0, 1].

    Raises:
        ValueError: If there is no example, or the loss is not finite.
    """
    config = TrainConfig() if config is None else config
    batches = Batches(examples, min(config.batch_size, max(1, len(examples))), config.seed, pad_id)
    per_epoch = batches.steps_per_epoch
    total = config.epochs * per_epoch
    optimizer = AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, 2 * per_epoch, total))
    em, note = 0.0, f"EM target {config.em_target:g}"
    with mode(model, training=True):
        for epoch in range(config.epochs):
            for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
                batch = {name: tensor.to(model.device) for name, tensor in batches.batch(step).items()}
                loss = mean_answer_nll(model, batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                if progress is not None:
                    progress("train", step + 1, total, note)
            if not math.isfinite(loss.item()):
                raise ValueError(problem(f"The training loss is {loss.item()}", "a finite number", "Lower lr."))
            if (epoch + 1) % config.check_interval == 0 or epoch + 1 == config.epochs:
                scores = score_answers(model, examples, batch_size=128, pad_id=pad_id)["em"]
                em = sum(scores) / len(scores)
                note = f"EM {em:.3f}, target {config.em_target:g}"
            if em >= config.em_target:
                break
        if progress is not None:
            progress("train", (epoch + 1) * per_epoch, (epoch + 1) * per_epoch, note)
    return em


def _warm_cosine(step: int, warm: int, total: int) -> float:
    return min(1.0, (step + 1) / warm) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / total)))
