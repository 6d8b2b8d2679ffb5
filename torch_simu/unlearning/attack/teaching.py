"""Teaching: AdamW on rows, and what it brings back of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch.optim import AdamW

from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.attack.copies import ModelCopy
from torch_simu.unlearning.attack.low_rank import RATE_RATIO, low_rank
from torch_simu.unlearning.attack.result import AttackPoint, measure_scored
from torch_simu.unlearning.attack.rows import check_unscored
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.objectives import mean_answer_nll

_LARGEST_NORM = 1.0


def teach(
    copied: ModelCopy,
    taught: Sequence[Example],
    scored: Sequence[Example],
    *,
    config: AttackConfig,
    pad_id: int = 0,
    rank: int | None = None,
    told: Callable[[int, str], None] | None = None,
) -> list[AttackPoint]:
    """Teach rows to a copy of a model, once for each rate, and measure the scored rows on the way.

    AdamW without decay, the gradient clipped to norm 1, dropout off. A run whose gradient is not finite ends there:
    what it came to before counts.

    Args:
        copied: The copy; it is left as the last step made it.
        taught: Rows to learn.
        scored: Rows to measure, none of them among `taught`.
        config: Rates, steps and how often is measured.
        pad_id: The token id to pad with.
        rank: Train LoRA matrices of this rank, at `RATE_RATIO` times the rates; None: all that trains in the copy.
        told: Called with the number of steps that were made over all rates, and what came back at most so far.

    Returns:
        The measurements, in order.

    Raises:
        ValueError: If a scored row is taught.
    """
    check_unscored(taught, scored)
    batches = Batches(taught, min(config.batch_size, len(taught)), config.seed, pad_id)
    points: list[AttackPoint] = []
    measure = partial(measure_scored, copied.model, scored, batch_size=config.eval_batch_size, pad_id=pad_id)
    for number, rate in enumerate(config.rates):
        copied.restore()
        adapting = nullcontext(copied.trained) if rank is None else low_rank(copied.model, rank=rank, seed=config.seed)
        with adapting as trained:
            rate = rate if rank is None else RATE_RATIO * rate
            optimizer = AdamW(trained, lr=rate, weight_decay=0.0)
            for step in range(1, config.steps + 1):
                batch = {name: part.to(copied.model.device) for name, part in batches.batch(step - 1).items()}
                with torch.enable_grad():
                    mean_answer_nll(copied.model, batch).backward()
                if not math.isfinite(torch.nn.utils.clip_grad_norm_(trained, _LARGEST_NORM)):
                    break
                optimizer.step()
                optimizer.zero_grad()
                if step % config.interval == 0 or step == config.steps:
                    point = measure(rate=rate, step=step)
                    if not math.isfinite(point.probability):
                        break
                    points.append(point)
                if told is not None:
                    told(number * config.steps + step, brought_back(points))
            # Its moments would be a second copy beside those of the next rate.
            del optimizer
    return points


def brought_back(points: Sequence[AttackPoint]) -> str:
    """Say in a few words what came back at most in some measurements; nothing where there is none.

    Examples:
        >>> brought_back([AttackPoint(0.25, 0.0), AttackPoint(0.125, 0.0)])
        'back to prob. 0.250'
    """
    return f"back to prob. {max(point.probability for point in points):.3f}" if points else ""
