"""The default's run as a plain loop with hooks, optimizer and balance, of which what is tried replaces a part."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import mean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.forgetting.cases import BATCH, Case
from benchmarks.forgetting.lasting import Row
from benchmarks.forgetting.tried.configured import LR, TARGET
from torch_simu import NeuronSelection, SIMUOptimizer, register_neuron_hooks
from torch_simu.optimizer import GradientBalance
from torch_simu.unlearning.adversary import Adversary
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.objectives import answer_log_probs, mean_answer_nll

DAMPING, EVERY = 0.1, 3
"""Of the covariances; steps between two measurements."""
SETS = ("forget", "retain")


class Loop:
    """Forgets as the default does; a subclass says what is done otherwise.

    Args:
        case: The model and the rows; a copy of the model forgets.
        seed: Of the batches.
        lr: Step size, as a share of the norm of a layer.
        probability: The forget probability to come down to.
        max_steps: Steps at most.
        adversary_lr: As in an `UnlearnConfig`.
        adversary_scope: As in an `UnlearnConfig`.
        adversary_from: The adversary is there from a forget probability of at most this on.
        adversary_retains: Whether the adversary learns the retain batch beside the forget batch.
        adversary_every: Steps between two of the adversary's; between them it stays where it is.
        covariance_of: The sets whose batches the covariances are of.
    """

    def __init__(
        self,
        case: Case,
        seed: int,
        *,
        lr: float = LR,
        probability: float = TARGET.probability,
        max_steps: int = 300,
        adversary_lr: float | Literal["auto"] | None = None,
        adversary_scope: Literal["trained", "all"] = "all",
        adversary_from: float = 1.0,
        adversary_retains: bool = False,
        adversary_every: int = 1,
        covariance_of: Sequence[str] = ("forget",),
    ) -> None:
        self.case, self.probability, self.steps, self.known = case, probability, 0, 1.0
        self._max_steps = max_steps
        self.model: PreTrainedModel = copy.deepcopy(case.model)
        self.selection = self.neurons()
        self.optimizer = SIMUOptimizer(
            self.selection.param_groups(self.model),
            lr=lr,
            betas=(0.9, 0.8),
            hessian_interval=5,
            curvature="both",
            damping=DAMPING,
        )
        self.balance = GradientBalance(self.optimizer)
        self.adversary, self._from, self._retains = None, adversary_from, adversary_retains
        self._every, self._covariance_of = adversary_every, covariance_of
        if adversary_lr is not None:
            everywhere = self.model if adversary_scope == "all" else None
            self.adversary = Adversary(self.optimizer, lr=adversary_lr, model=everywhere)
        rows = (self.forget_rows(), case.sets["retain"])
        self._streams = {
            name: Batches(each, case.batch_size, 3 * seed + place)
            for place, (name, each) in enumerate(zip(SETS, rows, strict=True))
        }

    def batch(self, name: str, number: int) -> dict[str, Tensor]:
        """The rows of a set that a step takes."""
        return self._streams[name].batch(number)

    def neurons(self) -> NeuronSelection:
        """What trains."""
        return NeuronSelection.full(self.model)

    def forget_rows(self) -> Sequence[Example]:
        """What the forget batches are of."""
        return self.case.sets["forget"]

    def differentiated(self, retain: dict[str, Tensor], due: bool) -> None:
        """Called when each set's gradient is there, that of the retain batch in `.grad`, and the curvature is fresh."""

    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def step(self) -> None:
        """Step along the combined gradient."""
        self.optimizer.step()

    def ended(self) -> bool:
        """Whether the model has forgotten enough, measured every few steps."""
        return self.known <= self.probability

    def scores(self) -> dict[str, list[float]]:
        """How well the model knows the forget set."""
        return score_answers(self.model, self.case.sets["forget"], batch_size=BATCH)

    def found(self) -> Row:
        """What else a row says."""
        return {}

    def run(self) -> tuple[PreTrainedModel, Row]:
        """Take all steps."""
        ended = False
        both: dict[str, Any] = {"reduce": "covariance", "outputs": True, "recording": False}
        with register_neuron_hooks(self.model, self.selection, **both) as hooks:
            while self.steps < self._max_steps and not ended:
                forget, retain = (self.batch(name, self.steps) for name in SETS)
                following = self.batch("forget", self.steps + 1)
                relearned = self._relearn(following, retain)
                hooks.reset()
                seen = {name: hooks.recording if name in self._covariance_of else nullcontext for name in SETS}
                with relearned, seen["forget"](), self.balance.forget():
                    log_probs, scored = answer_log_probs(self.model, forget)
                    log_probs[scored].exp().mean().backward()
                with seen["retain"]():
                    mean_answer_nll(self.model, retain).backward()
                due = self.optimizer.hessian_due
                if due:
                    self.optimizer.update_curvature(hooks)
                self.differentiated(retain, due)
                self.balance.combine_(retain_weight=2.0)
                self.step()
                self.optimizer.zero_grad()
                self.steps += 1
                if self.steps % EVERY == 0:
                    self.known = mean(self.scores()["probability"])
                    ended = self.ended()
        return self.model, {"steps": self.steps, "reached": ended, **self.found()}

    def _relearn(self, forget: dict[str, Tensor], retain: dict[str, Tensor]) -> Any:
        """Let the adversary learn; what comes back is where the forget gradient is taken."""
        if self.adversary is None or self.known > self._from:
            return nullcontext()
        taught = [forget, retain] if self._retains else [forget]
        if self.steps % self._every == 0:
            self.adversary.relearn(
                self.steps, lambda: torch.stack([mean_answer_nll(self.model, each) for each in taught]).sum()
            )
        return self.adversary.in_place()


def looped(case: Case, seed: int, *, kind: type[Loop] = Loop, **options: Any) -> tuple[PreTrainedModel, Row]:
    """The run of a loop."""
    return kind(case, seed, **options).run()
