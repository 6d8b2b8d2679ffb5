"""The Hugging Face Trainer: its loss is an unlearning objective, its optimizer trains selected neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from torch_simu._checks import problem
from torch_simu.curvature import IGNORED
from torch_simu.deltas import attached_layers, trained_groups
from torch_simu.neurons import NeuronSelection
from torch_simu.optimizer import SIMUOptimizer
from torch_simu.unlearning.config import CovarianceSets
from torch_simu.unlearning.data.pairs import PairCollator
from torch_simu.unlearning.objectives import Objective, Term
from torch_simu.unlearning.trainer.gradients import StepGradients

_UNITS = ("forget tokens", "retain tokens", "pairs")


class SIMUOptimizerFactory:
    """Makes the optimizer once the Trainer has its model: `optimizer_cls_and_kwargs=(SIMUOptimizerFactory, options)`.

    The Trainer calls it with the model and the options, so it works with `model_init`, too. The learning rate is the
    one in the options, not that of the `TrainingArguments`; the schedule starts from it.

    Examples:
        >>> model = nn.ModuleDict({"down": nn.Linear(4, 2)})
        >>> selection = NeuronSelection({"down": [1, 3]}, {"down": 4})
        >>> optimizer = SIMUOptimizerFactory()(model, selection=selection, attention="frozen", lr=1e-3)
        >>> optimizer.param_groups[0]["neurons"]
        [[1, 3]]
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        selection: NeuronSelection,
        attention: Literal["full", "frozen"] = "frozen",
        units: bool = False,
        **options: Any,
    ) -> SIMUOptimizer:
        """Return an optimizer of the selected neurons, or of their deltas; nothing else requires a gradient afterwards.

        Args:
            model: The model the selection was made on.
            selection: The neurons that train.
            attention: Whether the attention projections train whole; see `NeuronSelection.param_groups`.
            units: Whether the rows that make them train, too; see there.
            options: Those of `SIMUOptimizer`: `lr`, `rho`, `hessian_interval` and so on.

        Raises:
            ValueError: If an option is out of bounds, or the selection does not fit the model.
            KeyError: If a layer is not in the model.
        """
        return SIMUOptimizer(trained_groups(model, selection, attention, units=units), **options)


def allow_quantized_training(model: PreTrainedModel) -> None:
    """Let a Trainer train the deltas of a quantized model, which it refuses as "purely quantized" otherwise.

    It looks for adapters of its own kind. This says of the one model, in the one place where it looks, that it can be
    trained; codes are not.

    Args:
        model: A quantized model with deltas.

    Raises:
        ValueError: If no layer has a delta.
    """
    if not attached_layers(model):
        advice = "Call attach_deltas first: codes cannot be trained."
        raise ValueError(problem("No layer of the model has a delta", "at least one", advice))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        kind = type(quantizer)
        quantizer.__class__ = type(kind.__name__, (kind,), {"is_trainable": True, "is_qat_trainable": True})


class UnlearningTrainer(Trainer):
    """A `transformers.Trainer` that descends an unlearning objective on batches of forget and retain rows.

    Everything else is the Trainer's: schedules, logs, checkpoints, mixed precision, several devices. Each term of the
    objective is averaged over all micro-batches and processes of a step (see `Term.mean_over`), so a batch may be
    split by gradient accumulation or over devices without changing the step. The forget term is differentiated before
    the retain term is made, so one graph is held at a time.

    Where the optimizer's curvature is a covariance ("neurons" or "both"), the trainer hooks what trains for as long as
    `train` runs, and refreshes it from the rows of a step before it is made, where it is due. A `CurvatureRefresh` is
    for "gnb", on retain rows.

    The model is in train mode, as the Trainer sets it: switch dropout off in its configuration. The Trainer clips the
    norm of the gradient, unselected entries included and balanced already, unless `max_grad_norm=0`; a step of
    `SIMUOptimizer` is clipped by itself. The deltas of a quantized model train as they are.

    Args:
        model: As in `Trainer`.
        args: As in `Trainer`.
        objective: What is descended.
        balance: Whether the forget gradient is brought to the norm of the retain gradient before each step; see
            `torch_simu.optimizer.GradientBalance`.
        covariance_of: Which rows covariances are of: those to "forget", or "both" sets.
        options: Those of `Trainer`: `train_dataset` (a `ForgetRetainPairs`), `optimizer_cls_and_kwargs` (see
            `SIMUOptimizerFactory`), `callbacks` (a `CurvatureRefresh`) and others. `data_collator` is a `PairCollator`
            unless given. An `eval_dataset` is a list of `Example`; its loss is the mean over scored tokens.

    Raises:
        ValueError: When trained on rows that are not pairs; or with `balance` and accumulation under FSDP2, which adds
            up both gradients where they cannot be told apart.
    """

    # Both say that a loss is normalized over the whole step already: the first to this version, the second to others.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *,
        objective: Objective,
        balance: bool = False,
        covariance_of: CovarianceSets = "both",
        **options: Any,
    ) -> None:
        options.setdefault("data_collator", PairCollator())
        if model is not None and attached_layers(model):
            allow_quantized_training(model)
        super().__init__(model, args, **options)
        self.model_accepts_loss_kwargs = True
        self.objective: Objective = objective
        self.balance = balance
        self.covariance_of: CovarianceSets = covariance_of
        self._gradients: StepGradients | None = None
        # Weakly: a cycle would keep the model, and accelerate's hold of the loader, until garbage is collected.
        self.add_callback(_Afresh(WeakMethod(self._drop_gradients)))

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as `Trainer.train` does; hooks are off the model afterwards, however it ends."""
        try:
            return super().train(*args, **options)
        finally:
            self._drop_gradients()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the micro-batches of a step, and over all processes its forget tokens, retain tokens and pairs.

        Args:
            epoch_iterator: Of the loader's batches.
            num_batches: Micro-batches of the step.
            device: Where the counts are added up.

        Returns:
            The batches, and the counts. Shape: `(3,)`.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and all("forget" in batch for batch in batches):
            counts = torch.stack([_counts(batch) for batch in batches]).sum(dim=0)
            num_items = cast("Tensor", self.accelerator.reduce(counts.to(device), reduction="sum"))
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the objective's share of the step on one micro-batch; on plain rows, the mean loss of their tokens.

        Args:
            model: The model, as the Trainer wrapped it.
            inputs: Batches under "forget" and "retain"; or one batch, in an evaluation.
            return_outputs: Whether to return the model's output, too; there is none for an objective.
            num_items_in_batch: What `get_batch_samples` counted; None: this micro-batch is the step.

        Raises:
            ValueError: When trained on rows that are not pairs.
        """
        if "forget" not in inputs:
            if model.training:
                wrong = f"The training batch holds {', '.join(map(repr, inputs))}"
                raise ValueError(problem(wrong, "'forget' and 'retain'", "Take ForgetRetainPairs as train_dataset."))
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        losses = [term.weight * term.loss for term in self._terms(model, inputs, num_items_in_batch)]
        total = torch.stack(losses).sum()
        return (total, {}) if return_outputs else total

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Differentiate the terms on one micro-batch; behind the last one of a step, balance and refresh, too.

        Before the Trainer clips the gradient, so that what is clipped is what the step takes.

        Args:
            model: The model, as the Trainer wrapped it.
            inputs: As in `compute_loss`.
            num_items_in_batch: As in `compute_loss`.

        Returns:
            The micro-batch's share of the loss. Shape: `()`.

        Raises:
            ValueError: If gradients are balanced and accumulated under FSDP2.
        """
        if "forget" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if self._gradients is None:
            self._gradients = self._made_gradients()
        terms = self._terms(model, self._prepare_inputs(inputs), num_items_in_batch)
        found = self._gradients.add(terms, backward=self.accelerator.backward, last=self.accelerator.sync_gradients)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped]

            clear_device_cache()
        return torch.stack([weight * loss for weight, loss in found.values()]).sum()

    def _made_gradients(self) -> StepGradients:
        steps = self.args.gradient_accumulation_steps
        synced = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        if self.balance and steps > 1 and self.accelerator.is_fsdp2 and not synced:
            wrong = f"balance is True with gradient_accumulation_steps={steps} under FSDP2"
            advice = 'Pass accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}}.'
            raise ValueError(problem(wrong, "gradients that are reduced in each micro-batch", advice))
        return StepGradients(
            cast("nn.Module", self.model),
            cast("Optimizer", self.optimizer),
            balance=self.balance,
            covariance_of=self.covariance_of,
        )

    def _drop_gradients(self) -> None:
        if self._gradients is not None:
            self._gradients.remove()
        self._gradients = None

    def _terms(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Iterator[Term]:
        """Yield the terms of the objective, each with this micro-batch's share of the step as its loss."""
        for term in self.objective.terms(cast("PreTrainedModel", model), inputs["forget"], inputs["retain"]):
            if not isinstance(num_items_in_batch, Tensor):
                yield term
                continue
            unit = _UNITS.index(term.mean_over)
            here, everywhere = (each[unit].to(term.loss.device) for each in (_counts(inputs), num_items_in_batch))
            # The gradients of the processes are averaged, hence the factor.
            yield term._replace(loss=term.loss * here * self.accelerator.num_processes / everywhere)


class _Afresh(TrainerCallback):
    """Drops what a run that was broken off left, because the Trainer may start again by itself with smaller batches."""

    def __init__(self, drop: WeakMethod[Callable[[], None]]) -> None:
        self._drop = drop

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Drop it."""
        if (drop := self._drop()) is not None:
            drop()


def _counts(batch: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """Return the number of forget tokens, retain tokens and pairs. Shape: `(3,)`."""
    tokens = [(batch[name]["labels"][:, 1:] != IGNORED).sum() for name in ("forget", "retain")]
    return torch.stack([*tokens, torch.tensor(len(batch["forget"]["labels"]), device=tokens[0].device)])
