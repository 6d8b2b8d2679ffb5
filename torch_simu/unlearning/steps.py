"""One unlearning step: the batches it takes, the optimizer it moves, the record it leaves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from torch_simu._checks import problem
from torch_simu.deltas import trained_groups
from torch_simu.hooks import NeuronHooks
from torch_simu.layers import attention_projections, is_fused_experts, select_layers
from torch_simu.neurons import NeuronSelection
from torch_simu.optimizer import GradientBalance, SIMUOptimizer, covariance_hooks
from torch_simu.unlearning.adversary import Adversary
from torch_simu.unlearning.checkpoint import Record
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.data.examples import Example, collate
from torch_simu.unlearning.differentiate import differentiate, retain_weight
from torch_simu.unlearning.objectives import Objective, mean_answer_nll
from torch_simu.unlearning.pace import FIRST_SHARE
from torch_simu.unlearning.refresh import Refresh


class NonFiniteLossError(ValueError):
    """The loss or the gradient of a step is not finite, so the run stopped before it could change a weight."""


@dataclass(frozen=True, slots=True)
class StepBatches:
    """The batches of every step, each a pure function of the seed and the step.

    Args:
        forget: Rows to forget.
        retain: Rows to keep.
        config: Whose seed and batch sizes count.
        pad_id: The token id to pad with.
        device: The model's.
        rehearsed: Rows of which a step has as many as retain rows, beside these.
    """

    forget: Sequence[Example]
    retain: Sequence[Example]
    config: UnlearnConfig
    pad_id: int
    device: torch.device
    rehearsed: Sequence[Example] = ()

    def batch(self, what: Literal["forget", "retain"], number: int) -> dict[str, Tensor]:
        """Return the batch of a step (its `number`), on the model's device; `what` is "forget" or "retain"."""
        if what == "forget":
            rows = self._drawn(self.forget, self.config.forget_batch_size, 0, number)
        else:
            size = self.config.retain_batch_size
            rows = self._drawn(self.retain, size, 1, number) + self._drawn(self.rehearsed, size, 2, number)
        return {name: tensor.to(self.device) for name, tensor in collate(rows, self.pad_id).items()}

    def _drawn(self, examples: Sequence[Example], size: int, stream: int, number: int) -> list[Example]:
        if not examples:
            return []
        return Batches(examples, min(size, len(examples)), 3 * self.config.seed + stream).rows(number)


def make_optimizer(
    model: PreTrainedModel, selection: NeuronSelection | None, config: UnlearnConfig
) -> tuple[dict[str, nn.Parameter], Optimizer]:
    """Return the trained parameters of a model by name and their optimizer, as `config` and `selection` say.

    Nothing else requires a gradient afterwards.

    Raises:
        ValueError: If the method trains weights that are quantized, or a selected layer cannot be hooked.
    """
    groups: list[dict[str, object]]
    if selection is not None:
        _check_hookable(model, selection, config)
        groups = trained_groups(model, selection, config.attention, units=config.units)
    else:
        model.requires_grad_(False)
        owners = attention_projections(model).values() if config.where == "attention" else [model]
        chosen = list(dict.fromkeys(param for owner in owners for param in owner.parameters()))
        if any(not param.is_floating_point() for param in chosen):
            wrong = f"Method {config.method!r} trains weights that are quantized"
            advice = "Load the model without load_in, or take a method that trains neurons."
            raise ValueError(problem(wrong, "floating-point weights", advice))
        groups = [{"params": chosen}]
        for param in chosen:
            param.requires_grad_(True)
    trained = {id(param) for group in groups for param in cast("list[nn.Parameter]", group["params"])}
    params = {name: param for name, param in model.named_parameters() if id(param) in trained}
    lr = config.lr * (FIRST_SHARE if config.paced else 1.0)
    if not config.second_order:
        return params, AdamW(groups, lr=lr, weight_decay=config.weight_decay)
    return params, SIMUOptimizer(
        groups,
        lr=lr,
        betas=config.betas,
        rho=config.rho,
        weight_decay=config.weight_decay,
        clip=config.clip,
        hessian_interval=config.hessian_interval,
        curvature=config.curvature,
        damping=config.damping,
    )


def _check_hookable(model: PreTrainedModel, selection: NeuronSelection, config: UnlearnConfig) -> None:
    """Raise where a curvature from hooks is asked for on neurons that no hook sees."""
    for name, layer in select_layers(model, selection).items() if config.whitened else ():
        if is_fused_experts(layer):
            wrong = f"The neurons of layer {name!r} are inside experts fused into one parameter"
            advice = "Take the method simu_graddiff."
            raise ValueError(problem(wrong, f"layers that hooks see, for curvature {config.curvature!r}", advice))


def make_hooks(model: PreTrainedModel, optimizer: Optimizer, config: UnlearnConfig) -> NeuronHooks | None:
    """Return hooks on what an optimizer trains of a model, where the curvature of `config` is a covariance.

    They record inside `recording` only.
    """
    return covariance_hooks(model, optimizer, recording=False) if config.whitened else None


def make_adversary(model: PreTrainedModel, optimizer: Optimizer, config: UnlearnConfig) -> Adversary | None:
    """Return the adversary that `config` names, of what `optimizer` trains or of all of `model`, or None."""
    if config.adversary_lr is None:
        return None
    everywhere = model if config.adversary_scope == "all" else None
    return Adversary(optimizer, lr=config.adversary_lr, interval=config.adversary_interval, model=everywhere)


@dataclass(frozen=True, slots=True)
class Stepper:
    """Takes the steps of a run.

    Args:
        model: The model.
        optimizer: Of its trained parameters.
        objective: What is descended.
        stream: The batches.
        refresh: Refreshes a diagonal curvature on retain rows.
        hooks: See the batches where the curvature is a covariance.
        balance: Brings the forget gradient to the norm of the retain gradient.
        adversary: Where the forget gradient is taken.
    """

    model: PreTrainedModel
    optimizer: Optimizer
    objective: Objective
    stream: StepBatches
    refresh: Refresh
    hooks: NeuronHooks | None = None
    balance: GradientBalance | None = None
    adversary: Adversary | None = None

    def take(self, number: int) -> Record:
        """Take step `number`: descend the objective once, refresh the curvature when it is due, and return the record.

        Raises:
            NonFiniteLossError: If the loss or a gradient is not finite; no weight has changed then.
        """
        model, optimizer, lr = self.model, self.optimizer, self.stream.config.lr
        optimizer.zero_grad()
        forget = self.stream.batch("forget", number)
        due = self.hooks is not None and isinstance(optimizer, SIMUOptimizer) and optimizer.hessian_due
        if self.adversary is not None:
            following = self.stream.batch("forget", number + 1)
            self.adversary.relearn(number, lambda: mean_answer_nll(model, following))
        terms = self.objective.terms(model, forget, self.stream.batch("retain", number))

        def backward(loss: Tensor) -> None:
            if due:
                # Before the curvature is refreshed, which is behind the forget term.
                _check_loss(loss.item(), number, lr)
            loss.backward()

        found = differentiate(
            terms,
            balance=self.balance,
            at=partial(self._forgetting, due),
            beside=partial(self._recorded, due and self._sees_both),
            backward=backward,
        )
        if due and self._sees_both:
            self._update()
        losses = {name: (weight, loss.item()) for name, (weight, loss) in found.items()}
        record: Record = {"step": number + 1, "loss": sum(weight * value for weight, value in losses.values())}
        record |= {f"{name}_loss": value for name, (_, value) in losses.items()}
        _check_loss(record["loss"], number, lr)
        if due:
            record["refreshed"] = True
        if self.balance is not None:
            # First the retain gradient alone: its norm would take what is not finite into every parameter.
            _check_gradients(model, optimizer, number, lr)
            self.balance.combine_(retain_weight=retain_weight(found))
        _check_gradients(model, optimizer, number, lr)
        optimizer.step()
        optimizer.zero_grad()
        diagonal = self.hooks is None and isinstance(optimizer, SIMUOptimizer)
        if diagonal and self.refresh.after_step(model, optimizer, number):
            record["refreshed"] = True
        return record

    @contextmanager
    def _forgetting(self, due: bool) -> Iterator[None]:
        """Make and differentiate the forget term in here: at the adversary, and seen by the hooks.

        Behind it the curvature is refreshed where that is due, unless it is of the retain rows, too: what hooks summed
        up is gone before the retain term.
        """
        # With an adversary the covariance is that of the model which was taught again, where its gradients lie.
        if due and self.hooks is not None:
            self.hooks.reset()
        with self.adversary.in_place() if self.adversary is not None else nullcontext(), self._recorded(due):
            yield
        if due and not self._sees_both:
            self._update()

    @property
    def _sees_both(self) -> bool:
        return self.stream.config.covariance_of == "both"

    def _recorded(self, due: bool) -> AbstractContextManager[None]:
        return self.hooks.recording() if self.hooks is not None and due else nullcontext()

    def _update(self) -> None:
        if self.hooks is not None and isinstance(self.optimizer, SIMUOptimizer):
            self.optimizer.update_curvature(self.hooks, reset=True)


def _check_loss(loss: float, number: int, lr: float) -> None:
    if not math.isfinite(loss):
        wrong = f"The loss of step {number + 1} is {loss}"
        raise NonFiniteLossError(problem(wrong, "a finite number", f"Lower lr (it is {lr:g})."))


def _check_gradients(model: PreTrainedModel, optimizer: Optimizer, number: int, lr: float) -> None:
    """Raise before a step whose gradients are not finite: most optimizers would write them into the weights."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad for param in params if param.grad is not None and param.grad.numel()]
    # The largest entry: squares of finite half-precision gradients overflow.
    if not grads or torch.nn.utils.get_total_norm(grads, math.inf).isfinite():
        return
    trained = {id(param) for param in params}
    names = [
        name
        for name, param in model.named_parameters()
        if id(param) in trained and param.grad is not None and not param.grad.isfinite().all()
    ]
    wrong = f"The gradient of step {number + 1} is not finite in parameter {names[0]!r}"
    if len(names) > 1:
        wrong += f" and {len(names) - 1} more"
    raise NonFiniteLossError(problem(wrong, "finite numbers", f"Lower lr (it is {lr:g}), or load in bfloat16."))
