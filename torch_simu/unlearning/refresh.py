"""Refresh: the curvature of a SIMUOptimizer on retain rows, the same in the driver, a Trainer and any other loop."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel

from torch_simu._checks import check_count, problem
from torch_simu.curvature import IGNORED, gauss_newton_loss
from torch_simu.layers.dtensors import is_dtensor
from torch_simu.optimizer import SIMUOptimizer
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.data.examples import Example, collate
from torch_simu.unlearning.objectives import answer_logits


class Refresh:
    r"""Refreshes the curvature of a `SIMUOptimizer` on retain rows whenever it is due, in any loop.

    Call `after_step` behind each step. The driver does, and in a Trainer
    `torch_simu.unlearning.trainer.refresh.CurvatureRefresh`.

    With $N$ the scored tokens of the batch and $\ell_i$ the summed cross-entropy of row $i$ on labels sampled from the
    model, it differentiates $\frac{1}{N} \sum_i \ell_i$ (see `gauss_newton_loss`). The batch depends on the seed and
    the step alone, the labels of a row on the seed, the step and the row's place in the batch. So the estimate is the
    same however the batch is split into micro-batches or over processes.

    Args:
        retain: Encoded rows to keep, each with a scored token.
        batch_size: Rows per refresh, over all processes.
        micro_batch_size: Rows per forward pass in each process; None: all of its rows at once.
        seed: Of the batches and of the sampled labels.
        pad_id: The token id to pad with.

    Raises:
        ValueError: If `retain` is empty, a row has no scored token, or a size is not positive.

    Examples:
        >>> Refresh([Example((5, 6), (-100, 6))], batch_size=4).rows(step=0)
        [Example(input_ids=(5, 6), labels=(-100, 6))]
    """

    def __init__(
        self,
        retain: Sequence[Example],
        *,
        batch_size: int = 16,
        micro_batch_size: int | None = None,
        seed: int = 0,
        pad_id: int = 0,
    ) -> None:
        if not retain:
            raise ValueError(problem("The retain set is empty", "at least one example"))
        for number, example in enumerate(retain):
            if not _num_tokens(example):
                raise ValueError(problem(f"Retain example {number} has no scored token", "at least one behind another"))
        check_count("batch_size", batch_size)
        self._micro_batch_size = batch_size if micro_batch_size is None else micro_batch_size
        check_count("micro_batch_size", self._micro_batch_size)
        self._seed = seed
        self._batches = Batches(retain, min(batch_size, len(retain)), 3 * seed + 2, pad_id)

    def rows(self, step: int) -> list[Example]:
        """Return the rows of the refresh behind a step, counted from 0, over all processes."""
        return [self._batches.examples[index] for index in self._batches.indices(step)]

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> bool:
        """Refresh the curvature if it is due; gradients are left as they were.

        All processes must call it. The loss is not scaled by a GradScaler's rules: if `optimizer` has a scaler, only
        the number is used, and taken out again.

        Args:
            model: The trained model, as it is or wrapped for data parallelism.
            optimizer: A `SIMUOptimizer`, as it is or wrapped by accelerate.
            step: The step that was just made, counted from 0.

        Returns:
            Whether the curvature was due.

        Raises:
            TypeError: If there is no `SIMUOptimizer` in `optimizer`.
            ValueError: If its curvature is another one, as a covariance from hooks.
        """
        simu = find_refreshed_optimizer(optimizer)
        if not simu.hessian_due:
            return False
        scaler = getattr(optimizer, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        # A wrapper would wait for another backward, or reduce a gradient that is reduced here.
        plain = model.module if isinstance(model, DistributedDataParallel | DataParallel) else model
        with _gradients_set_aside(plain):
            num_tokens = self._differentiate(plain, step, scale)
            simu.update_hessian(num_tokens, grad_scale=None if scaler is None else scale)
        return True

    def _differentiate(self, model: nn.Module, step: int, scale: float) -> int:
        """Leave the gradient of the mean over all rows and processes in `.grad`; return the number of tokens."""
        rows = list(enumerate(self.rows(step)))
        num_tokens = sum(_num_tokens(row) for _, row in rows)
        rank, world = (distributed.get_rank(), distributed.get_world_size()) if _is_distributed() else (0, 1)
        for start in range(0, len(rows), world * self._micro_batch_size):
            share = rows[start : start + world * self._micro_batch_size][rank::world]
            # Each process makes as many passes as the others, which a model in shards needs; an extra one counts zero.
            weight = scale * world / num_tokens if share else 0.0
            (weight * self._summed_loss(model, share or rows[:1], step)).backward()
        if world > 1:
            for param in model.parameters():
                # A gradient in shards is averaged already.
                if param.grad is not None and not is_dtensor(param.grad):
                    # Divided here, since gloo cannot average.
                    distributed.all_reduce(param.grad.div_(world))
        return num_tokens

    def _summed_loss(self, model: nn.Module, rows: Sequence[tuple[int, Example]], step: int) -> Tensor:
        device = next(model.parameters()).device
        batch = collate([row for _, row in rows], self._batches.pad_id)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = answer_logits(cast("PreTrainedModel", model), batch)
        losses = []
        for place, (number, _) in enumerate(rows):
            # Seeded with text, which Python hashes with SHA-512: neighboring steps and rows share nothing.
            draw_seed = random.Random(f"{self._seed} {step} {number}").getrandbits(63)
            draw = torch.Generator(logits.device).manual_seed(draw_seed)
            one = slice(place, place + 1)
            loss, num_tokens = gauss_newton_loss(logits[one], batch["labels"][one], generator=draw)
            losses.append(loss * num_tokens)
        return torch.stack(losses).sum()


def find_simu_optimizer(optimizer: object) -> SIMUOptimizer:
    """Return the `SIMUOptimizer` that `optimizer` is or wraps, as accelerate does.

    Raises:
        TypeError: If there is none.

    Examples:
        >>> optimizer = SIMUOptimizer([torch.nn.Parameter(torch.zeros(2))])
        >>> find_simu_optimizer(optimizer) is optimizer
        True
    """
    found = optimizer
    while found is not None and not isinstance(found, SIMUOptimizer):
        found = getattr(found, "optimizer", None)
    if found is None:
        wrong = f"The optimizer is {type(optimizer).__name__}"
        advice = "Pass optimizer_cls_and_kwargs=(SIMUOptimizerFactory, {'selection': selection}) to the Trainer."
        raise TypeError(problem(wrong, "a SIMUOptimizer", advice))
    return found


def find_refreshed_optimizer(optimizer: object) -> SIMUOptimizer:
    """Return the `SIMUOptimizer` that `optimizer` is or wraps, if a `Refresh` is what refreshes its curvature.

    Raises:
        TypeError: If there is none.
        ValueError: If its curvature is another one, as a covariance from hooks.
    """
    simu = find_simu_optimizer(optimizer)
    found = {group["curvature"] for group in simu.param_groups}
    if "gnb" not in found:
        wrong = f"The optimizer has curvature {', '.join(map(repr, sorted(found)))}, which retain rows do not refresh"
        advice = (
            "Leave the refresh out: UnlearningTrainer refreshes covariances itself, in other loops CovarianceRefresh."
        )
        raise ValueError(problem(wrong, "'gnb'", advice))
    return simu


def _num_tokens(example: Example) -> int:
    # The first token is predicted by nothing.
    return sum(label != IGNORED for label in example.labels[1:])


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def _gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """Give the block parameters without gradients, and put those back that were there."""
    kept = [(param, param.grad) for param in model.parameters() if param.requires_grad]
    try:
        for param, _ in kept:
            param.grad = None
        yield
    finally:
        for param, grad in kept:
            param.grad = grad
