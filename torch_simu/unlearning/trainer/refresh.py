"""CurvatureRefresh: the refresh of the curvature as a callback of the Hugging Face Trainer."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from torch_simu.unlearning.refresh import Refresh, find_refreshed_optimizer


class CurvatureRefresh(Refresh, TrainerCallback):
    """`Refresh` in a Trainer: `callbacks=[CurvatureRefresh(retain)]`, with the arguments of `Refresh`.

    It acts when a step is complete and before a checkpoint is written, so a resumed run has the bits of an unbroken
    one. In another loop, with accelerate say, call `after_step` behind each step.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Refuse an optimizer whose curvature is not refreshed on retain rows, before the first step.

        Called with `args`, `state` and `control` as any `TrainerCallback`.

        Raises:
            TypeError: If the Trainer has no `SIMUOptimizer`.
            ValueError: If its curvature is another one, as a covariance from hooks.
        """
        find_refreshed_optimizer(kwargs.get("optimizer"))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Refresh the curvature if it is due: the step is made and counted, the checkpoint not yet written.

        Called with `args`, `state` and `control` as any `TrainerCallback`.
        """
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        assert isinstance(model, nn.Module) and isinstance(optimizer, Optimizer)
        self.after_step(model, optimizer, state.global_step - 1)
