"""unlearn: the two steps end to end, from a forget set and a retain set to a model that forgot."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from torch_simu._checks import problem
from torch_simu.attribution import Attribution
from torch_simu.columns import Columns
from torch_simu.neurons import NeuronSelection
from torch_simu.optimizer import GradientBalance
from torch_simu.unlearning.checkpoint import Record, RunCheckpoint, fingerprint
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.batches import evenly
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.data.fits import check_fits
from torch_simu.unlearning.identity import identity
from torch_simu.unlearning.localization import localize
from torch_simu.unlearning.metrics.scoring import mode, score_answers
from torch_simu.unlearning.objectives import Objective, Refusals, make_objective
from torch_simu.unlearning.pace import pace
from torch_simu.unlearning.progress import Progress, steps_left
from torch_simu.unlearning.refresh import Refresh
from torch_simu.unlearning.rehearsal.rehearse import rehearse
from torch_simu.unlearning.steps import StepBatches, Stepper, make_adversary, make_hooks, make_optimizer


@dataclass(frozen=True, slots=True)
class Unlearned:
    """What an unlearning run did; the model itself was changed in place.

    Attributes:
        selection: The neurons that trained; None where the method trains whole parameters.
        attribution: The forget set's scores; None where none were needed.
        log: One record per step: `step`, `loss`, the loss of each term, `refreshed` where the curvature was, and where
            measured `forget_probability` and `monitor`, with `em`, `es` and `probability` of each monitored set.
        reached: Whether the forget target was reached.
        changed_share: Share of the model's weights that differ from before.
        optimizer_bytes: Bytes of the optimizer's state at the end.
        seconds: Wall time of both steps, without the monitored measurements.
    """

    selection: NeuronSelection | None
    attribution: Attribution | None
    log: list[Record]
    reached: bool
    changed_share: float
    optimizer_bytes: int
    seconds: float

    @property
    def steps(self) -> int:
        """How many steps were made."""
        return len(self.log)


def unlearn(
    model: PreTrainedModel,
    forget: Sequence[Example],
    retain: Sequence[Example],
    *,
    config: UnlearnConfig | None = None,
    objective: Objective | None = None,
    refusals: Refusals | None = None,
    selection: NeuronSelection | None = None,
    monitor: Mapping[str, Sequence[Example]] | None = None,
    pad_id: int = 0,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Unlearned:
    """Make `model` forget one set and keep another, in place: attribute, select, then step until the target.

    A diagonal curvature is refreshed on retain batches, so that the step is short where the retain set bends;
    covariances are those of the batches of a step, so that it stays out of what their rows share. Dropout is off.
    Batch `i` and the labels sampled at step `i` depend on the seed and `i` alone: a run that is killed and called again
    with the same `checkpoint` ends with the same bits as one that was not.

    Args:
        model: A causal language model. Quantized layers get deltas, which stay attached.
        forget: Encoded rows to forget, as `torch_simu.unlearning.data.examples.encode` makes them.
        retain: Encoded rows to keep.
        config: Every choice of the run.
        objective: What is descended, in place of the one the configuration names.
        refusals: Refusing answers as token ids, for an objective that needs them, as
            `torch_simu.unlearning.data.refusals.encode_refusals` makes them.
        selection: Neurons to train, in place of those the configuration would find.
        monitor: Sets to measure every `config.monitor_interval` steps, for the log.
        pad_id: The token id to pad with.
        checkpoint: A folder to save the run to and to continue from; it is left there when the run is complete.
        progress: See `Progress`.

    Returns:
        What was done, with the step log.

    Raises:
        ValueError: If a set is empty or does not fit into the model, the objective needs refusals and there are none,
            or `checkpoint` belongs to another run.
        NonFiniteLossError: If the loss or a gradient of a step is not finite.
    """
    config = UnlearnConfig() if config is None else config
    for name, examples in (("forget", forget), ("retain", retain)):
        if not examples:
            raise ValueError(problem(f"The {name} set is empty", "at least one example"))
        check_fits(model, examples)
    if refusals:
        longest = max(map(tuple, refusals), key=len)
        check_fits(model, [Example((*row.prompt_ids, *longest), (), f"{row.place} with a refusal") for row in forget])
    flags = [(param, param.requires_grad) for param in model.parameters()]
    started, measuring = time.perf_counter(), 0.0
    saved = None
    try:
        with mode(model, training=False), ExitStack() as opened:
            if checkpoint is not None:
                run = _fingerprint(model, forget, retain, config, objective, refusals, selection)
                saved = RunCheckpoint.open(Path(checkpoint), run)
            selection, attribution = localize(
                model, forget, retain, config, selection=selection, pad_id=pad_id, checkpoint=saved, progress=progress
            )
            # Behind the attribution, which is of the rows that were given.
            options = {"seed": config.seed, "batch_size": config.eval_batch_size, "pad_id": pad_id}
            written = (
                rehearse(model, retain, config.rehearsal, forget=forget, progress=progress, **options)
                if config.rehearsal
                else []
            )
            params, optimizer = make_optimizer(model, selection, config)
            if objective is None:
                # Before a checkpoint is loaded, and with what trains marked: some compare with the model as it is now.
                objective = make_objective(
                    config.objective,
                    retain_weight=config.retain_weight,
                    retain_term=config.retain_term,
                    model=model,
                    refusals=refusals,
                )
            adversary = make_adversary(model, optimizer, config)
            columns = _trained_columns(optimizer)
            start = {name: _entries(param, columns, copy=True) for name, param in params.items()}
            log = [] if saved is None else saved.load(params, optimizer, adversary)
            stream = StepBatches(forget, retain, config, pad_id, model.device, written)
            kept = [*retain, *written]
            refresh = Refresh(kept, batch_size=config.hessian_batch_size, seed=config.seed, pad_id=pad_id)
            hooks = opened.enter_context(make_hooks(model, optimizer, config) or nullcontext())
            balance = GradientBalance(optimizer) if config.balance else None
            stepper = Stepper(model, optimizer, objective, stream, refresh, hooks, balance, adversary)
            reached = bool(log) and _reached(log[-1], config)
            while len(log) < config.max_steps and not reached:
                number = len(log)
                record = stepper.take(number)
                last = number + 1 == config.max_steps
                if (number + 1) % config.eval_interval == 0 or last:
                    record["forget_probability"] = _known(model, forget, config, pad_id)
                    reached = _reached(record, config)
                if monitor and ((number + 1) % config.monitor_interval == 0 or reached or last):
                    before = time.perf_counter()
                    record["monitor"] = _monitored(model, monitor, config.eval_batch_size, pad_id)
                    measuring += time.perf_counter() - before
                log.append(record)
                if config.paced:
                    pace(optimizer, log, largest=config.lr)
                if saved is not None and ((number + 1) % config.checkpoint_interval == 0 or reached or last):
                    saved.save(params, optimizer, log, adversary)
                if progress is not None:
                    _tell(progress, log, reached, config)
    except (ValueError, TypeError, KeyError):
        if saved is not None:
            saved.remove_if_empty()
        raise
    finally:
        for param, flag in flags:
            param.requires_grad_(flag)
            param.grad = None
    return Unlearned(
        selection,
        attribution,
        log,
        reached,
        changed_share=_changed(params, columns, start) / sum(param.numel() for param in model.parameters()),
        optimizer_bytes=state_bytes(optimizer),
        seconds=time.perf_counter() - started - measuring,
    )


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of all tensors in an optimizer's state.

    Examples:
        >>> import torch
        >>> state_bytes(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4))]))
        0
    """
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _known(model: PreTrainedModel, forget: Sequence[Example], config: UnlearnConfig, pad_id: int) -> float:
    """Measure the mean probability of forget rows, of some of them first where there are many."""
    some = evenly(forget, config.eval_rows)

    def mean_of(rows: Sequence[Example]) -> float:
        return _mean(score_answers(model, rows, batch_size=config.eval_batch_size, pad_id=pad_id)["probability"])

    found = mean_of(some)
    # The target is reached by all rows, or not at all.
    return mean_of(forget) if len(some) < len(forget) and _reached({"forget_probability": found}, config) else found


def _reached(record: Record, config: UnlearnConfig) -> bool:
    target = config.forget_target
    return target is not None and record.get("forget_probability", math.inf) <= target


def _tell(progress: Progress, log: Sequence[Record], reached: bool, config: UnlearnConfig) -> None:
    """Tell the steps that were made of those that are expected, which the forget target makes fewer."""
    done = len(log)
    measured = [(each["step"], each["forget_probability"]) for each in log if "forget_probability" in each]
    target = "" if config.forget_target is None else f" (target {config.forget_target:g})"
    notes = [f"forget prob. {measured[-1][1]:.3f}{target}"] if measured else []
    total = done if reached else config.max_steps
    if config.forget_target is not None and not reached:
        left = steps_left(measured, config.forget_target)
        if left is not None and measured[-1][0] + left < total:
            total = max(done + 1, measured[-1][0] + left)
            notes.append(f"about {total - done} steps left")
    progress("unlearn", done, total, ", ".join(notes))


def _monitored(
    model: PreTrainedModel, monitor: Mapping[str, Sequence[Example]], batch_size: int, pad_id: int
) -> Record:
    measured: Record = {}
    for name, examples in monitor.items():
        scores = score_answers(model, examples, batch_size=batch_size, pad_id=pad_id)
        measured[name] = {key: _mean(scores[key]) for key in ("em", "es", "probability")}
    return measured


def _trained_columns(optimizer: Optimizer) -> dict[nn.Parameter, Columns]:
    """Return the columns of each parameter that can change at all, where those are not all of them."""
    return {
        param: Columns(group["neuron_dim"], torch.tensor(neurons, dtype=torch.int64, device=param.device))
        for group in optimizer.param_groups
        for param, neurons in zip(group["params"], group.get("neurons", ()), strict=False)
        if neurons is not None
    }


def _entries(param: nn.Parameter, columns: Mapping[nn.Parameter, Columns], *, copy: bool = False) -> Tensor:
    chosen = columns[param].gather(param.detach()) if param in columns else param.detach()
    return chosen.to("cpu", copy=copy)


def _changed(
    params: Mapping[str, nn.Parameter], columns: Mapping[nn.Parameter, Columns], start: Mapping[str, Tensor]
) -> int:
    return sum(int((_entries(param, columns) != start[name]).sum()) for name, param in params.items())


def _fingerprint(
    model: PreTrainedModel,
    forget: Sequence[Example],
    retain: Sequence[Example],
    config: UnlearnConfig,
    objective: Objective | None,
    refusals: Refusals | None,
    selection: NeuronSelection | None,
) -> str:
    chosen = None if selection is None else {layer: selection[layer].tolist() for layer in selection}
    # A run may be continued with more steps or other intervals: they change when it ends, not what a step does.
    choices = {
        name: value
        for name, value in config.to_json().items()
        if (name not in ("max_steps", "forget_target") and not name.startswith(("eval_", "monitor_", "checkpoint_")))
        # What is measured sets the pace.
        or (config.paced and name in ("eval_interval", "eval_rows"))
    }
    data = [[(row.input_ids, row.labels) for row in rows] for rows in (forget, retain)]
    configuration = {"config": choices, "objective": identity(objective), "selection": chosen, "data": data}
    if refusals is not None:
        configuration["refusals"] = [list(refusal) for refusal in refusals]
    return fingerprint(configuration, model.parameters())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
