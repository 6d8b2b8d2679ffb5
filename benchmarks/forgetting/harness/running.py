"""A run: a copy of a case's model forgets, by `unlearn` or by a loop with another optimizer, traced on the way."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import PreTrainedModel

from benchmarks.forgetting.cases import BATCH, Case
from benchmarks.forgetting.harness.collapsing import collapsing
from benchmarks.forgetting.harness.contenders import Contender
from benchmarks.forgetting.harness.tracing import Trace
from torch_simu.optimizer import GradientBalance, SIMUOptimizer, soul
from torch_simu.unlearning.attack.low_rank import low_rank
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.refusals import encode_refusals
from torch_simu.unlearning.differentiate import differentiate, retain_weight
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.metrics.scoring import mode, score_answers
from torch_simu.unlearning.objectives import REFUSING, make_objective
from torch_simu.unlearning.pace import FIRST_SHARE, pace
from torch_simu.unlearning.progress import Progress
from torch_simu.unlearning.steps import StepBatches

Row = dict[str, Any]
RANK = 32
"""With it the matrices beside all linear layers have about as many weights as the down projections."""


def forgotten(
    case: Case, contender: Contender, config: UnlearnConfig, *, traced: bool = True
) -> tuple[PreTrainedModel, Row]:
    """A copy of the model that forgot, and how it went: steps, whether the target was reached, seconds, the trace."""
    model = copy.deepcopy(case.model)
    trace = Trace(model, case) if traced else None
    if contender.steps == "unlearn":
        refusals = encode_refusals(case.tokenizer) if config.objective in REFUSING and case.tokenizer else None
        mask = None if contender.mask is None else contender.mask(case, config.seed)
        forget, retain = case.sets["forget"], case.sets["retain"]
        with contender.within():
            done = unlearn(model, forget, retain, config=config, refusals=refusals, selection=mask, progress=trace)
        row: Row = {"steps": done.steps, "reached": done.reached, "seconds": done.seconds}
        log = done.log
    else:
        row, log = by_loop(model, case, contender, config, trace)
    if trace is not None:
        row["seconds"] -= trace.seconds
        row["trace"] = trace.beside(log)
    return model, {**row, "seconds": round(row["seconds"], 1)}


def by_loop(
    model: PreTrainedModel, case: Case, contender: Contender, config: UnlearnConfig, progress: Progress | None
) -> tuple[Row, list[Row]]:
    """Forget with an optimizer that no method of the package has, on the batches that the others see."""
    started = time.perf_counter()
    log: list[Row] = []
    with mode(model, training=False), STEPS[contender.steps](model, case, config) as (optimizer, differentiated):
        for group in optimizer.param_groups:
            group["lr"] *= FIRST_SHARE if config.paced else 1.0
        reached = False
        while len(log) < config.max_steps and not reached:
            number = len(log)
            differentiated(number)
            optimizer.step()
            optimizer.zero_grad()
            log.append({"step": number + 1})
            if (number + 1) % config.eval_interval == 0 or number + 1 == config.max_steps:
                found = score_answers(model, case.sets["forget"], batch_size=BATCH)["probability"]
                log[-1]["forget_probability"] = sum(found) / len(found)
                reached = log[-1]["forget_probability"] <= config.forget_target
            if config.paced:
                pace(optimizer, log, largest=config.lr)
            if progress is not None:
                progress("unlearn", number + 1, number + 1 if reached else config.max_steps)
    model.requires_grad_(True)
    return {"steps": len(log), "reached": reached, "seconds": time.perf_counter() - started}, log


Steps = AbstractContextManager[tuple[Optimizer, Callable[[int], None]]]
"""An optimizer, and what leaves the gradients of a step there, by its number."""


@contextmanager
def by_soul(model: PreTrainedModel, case: Case, config: UnlearnConfig) -> Iterator[tuple[Optimizer, Any]]:
    """SOUL's optimizer of all weights."""
    optimizer = SIMUOptimizer(model.requires_grad_(True).parameters(), **soul(lr=config.lr))
    yield optimizer, balanced(model, case, config, optimizer)


@contextmanager
def by_low_rank(model: PreTrainedModel, case: Case, config: UnlearnConfig) -> Iterator[tuple[Optimizer, Any]]:
    """AdamW of LoRA matrices, which are a part of the weights afterwards."""
    with low_rank(model, rank=RANK, seed=config.seed) as matrices:
        optimizer = AdamW(matrices, lr=config.lr, weight_decay=0.0)
        yield optimizer, balanced(model, case, config, optimizer)
        for layer in model.modules():
            if isinstance(layer, nn.Module) and hasattr(layer, "lora_A"):
                layer.merge()


@contextmanager
def by_collapse(model: PreTrainedModel, case: Case, config: UnlearnConfig) -> Iterator[tuple[Optimizer, Any]]:
    """RepSelect's one gradient, at every step."""
    weights, gradients = collapsing(model, case, config)

    def differentiated(number: int) -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient

    yield SGD(weights, lr=config.lr), differentiated


STEPS: Mapping[str, Callable[[PreTrainedModel, Case, UnlearnConfig], Steps]] = {
    "soul": by_soul,
    "low rank": by_low_rank,
    "collapse": by_collapse,
}


def balanced(model: PreTrainedModel, case: Case, config: UnlearnConfig, optimizer: Optimizer) -> Callable[[int], None]:
    """What leaves the balanced gradients of a batch of each set."""
    stream = StepBatches(case.sets["forget"], case.sets["retain"], config, 0, model.device)
    objective = make_objective(config.objective, retain_weight=config.retain_weight, model=model)
    balance = GradientBalance(optimizer)

    def differentiated(number: int) -> None:
        terms = objective.terms(model, stream.batch("forget", number), stream.batch("retain", number))
        balance.combine_(retain_weight=retain_weight(differentiate(terms, balance=balance)))

    return differentiated
