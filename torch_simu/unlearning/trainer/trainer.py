"""The Hugging Face Trainer: its loss is an unlearning objective, its optimizer trains selected neurons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from torch_simu._checks import problem
from torch_simu.curvature import IGNORED
from torch_simu.deltas import attached_layers, trained_groups
from torch_simu.neurons import NeuronSelection
from torch_simu.optimizer import SIMUOptimizer
from torch_simu.unlearning.data.pairs import PairCollator
from torch_simu.unlearning.objectives import Objective

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
        **options: Any,
    ) -> SIMUOptimizer:
        """Return an optimizer of the selected neurons, or of their deltas; nothing else requires a gradient afterwards.

        Args:
            model: The model the selection was made on.
            selection: The neurons that train.
            attention: Whether the attention projections train whole; see `NeuronSelection.param_groups`.
            options: Those of `SIMUOptimizer`: `lr`, `rho`, `hessian_interval` and so on.

        Raises:
            ValueError: If an option is out of bounds, or the selection does not fit the model.
            KeyError: If a layer is not in the model.
        """
        return SIMUOptimizer(trained_groups(model, selection, attention), **options)


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
    split by gradient accumulation or over devices without changing the step. The objective makes one forward pass on
    the forget rows and one on the retain rows before the backward pass.

    The model is in train mode, as the Trainer sets it: switch dropout off in its configuration. The Trainer clips the
    norm of the gradient, unselected entries included, unless `max_grad_norm=0`; a step of `SIMUOptimizer` is clipped
    by itself. The deltas of a quantized model train as they are.

    Args:
        model: As in `Trainer`.
        args: As in `Trainer`.
        objective: What is descended.
        options: Those of `Trainer`: `train_dataset` (a `ForgetRetainPairs`), `optimizer_cls_and_kwargs` (see
            `SIMUOptimizerFactory`), `callbacks` (a `CurvatureRefresh`) and others. `data_collator` is a `PairCollator`
            unless given. An `eval_dataset` is a list of `Example`; its loss is the mean over scored tokens.

    Raises:
        ValueError: When trained on rows that are not pairs.
    """

    # Both say that a loss is normalized over the whole step already: the first to this version, the second to others.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *,
        objective: Objective,
        **options: Any,
    ) -> None:
        options.setdefault("data_collator", PairCollator())
        if model is not None and attached_layers(model):
            allow_quantized_training(model)
        super().__init__(model, args, **options)
        self.model_accepts_loss_kwargs = True
        self.objective: Objective = objective

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the micro-batches of a step, and over all processes its forget tokens, retain tokens and pairs.

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
        losses = []
        for term in self.objective.terms(cast("PreTrainedModel", model), inputs["forget"], inputs["retain"]):
            loss = term.weight * term.loss
            if isinstance(num_items_in_batch, Tensor):
                unit = _UNITS.index(term.mean_over)
                here, everywhere = _counts(inputs)[unit].to(loss.device), num_items_in_batch[unit].to(loss.device)
                # The gradients of the processes are averaged, hence the factor.
                loss = loss * here * self.accelerator.num_processes / everywhere
            losses.append(loss)
        total = torch.stack(losses).sum()
        return (total, {}) if return_outputs else total


def _counts(batch: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """Return the number of forget tokens, retain tokens and pairs. Shape: `(3,)`."""
    tokens = [(batch[name]["labels"][:, 1:] != IGNORED).sum() for name in ("forget", "retain")]
    return torch.stack([*tokens, torch.tensor(len(batch["forget"]["labels"]), device=tokens[0].device)])
