"""Wrong implementations of the optimizer, each with one defect that was made somewhere or could easily be made.

A class is the optimizer with another method; a function makes the wrong one from the right one that `REPLACED` names.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from torch_simu import SIMUOptimizer
from torch_simu.columns import Columns
from torch_simu.update import round_stochastically


class DecaysEveryColumn(SIMUOptimizer):
    """Masks the gradient only, as WAGLE does: weights that have none still decay."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.mul_(1 - group["lr"] * group["weight_decay"])
        return super().step(closure)


def steps_beside_the_neurons(original):
    """Counts neurons from one instead of zero."""

    def columns(self, group, number, position):
        right = original(self, group, number, position)
        size = group["params"][position].shape[right.dim]
        return Columns(right.dim, (right.indices + 1) % size)

    return columns


class TakesTheOtherDimension(SIMUOptimizer):
    """Ignores which dimension of the weight the neurons are."""

    def add_param_group(self, param_group):
        super().add_param_group({**param_group, "neuron_dim": -1})


class RoundsTheWholeWeight(SIMUOptimizer):
    """Writes the whole weight back through a shorter dtype."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.copy_(param.bfloat16())
        return loss


def keeps_dense_state(original):
    """Keeps a mask of the layer's shape."""
    return lambda group, entry: {**original(group, entry), "mask": torch.ones_like(entry.param)}


def keeps_a_third_moment(original):
    """Keeps compact state that the law does not allow."""
    return lambda group, entry: {**original(group, entry), "previous": torch.zeros_like(entry.grad)}


def forgets_to_clip(original):
    """Takes the full Newton step."""
    return lambda group, *rest: original({**group, "clip": math.inf}, *rest)


def decays_without_the_step_size(original):
    """Multiplies the weight by one minus the decay."""
    return lambda group, *rest: original({**group, "weight_decay": group["weight_decay"] / group["lr"]}, *rest)


def updates_momentum_twice(original):
    """Updates the momentum twice per step, as SOUL does."""

    def step(group, entries, states, finite):
        for entry, state in zip(entries, states, strict=True):
            state["exp_avg"].lerp_(entry.grad, 1 - group["betas"][0])
        original(group, entries, states, finite)

    return step


class ForgetsTheBatchFactor(SIMUOptimizer):
    """Squares the mean gradient without the number of positions behind the mean."""

    def update_hessian(self, num_tokens, *, grad_scale=None, last=True):
        super().update_hessian(1, grad_scale=grad_scale, last=last)


class SwapsTheBetas(SIMUOptimizer):
    """Averages the curvature with the momentum's decay."""

    def update_hessian(self, num_tokens, *, grad_scale=None, last=True):
        for group in self.param_groups:
            group["betas"] = group["betas"][::-1]
        super().update_hessian(num_tokens, grad_scale=grad_scale, last=last)
        for group in self.param_groups:
            group["betas"] = group["betas"][::-1]


class SquaresEveryGradient(SIMUOptimizer):
    """Folds the step's own gradient into the curvature before each step: the empirical Fisher."""

    def step(self, closure=None):
        due = [group["next_refresh"] for group in self.param_groups]
        self.update_hessian(7)
        for group, value in zip(self.param_groups, due, strict=True):
            group["next_refresh"] = value
        return super().step(closure)


class FoldsCurvatureInLate(SIMUOptimizer):
    """Uses a refreshed curvature only from the next refresh on."""

    def update_hessian(self, num_tokens, *, grad_scale=None, last=True):
        late = getattr(self, "_late", {})
        super().update_hessian(num_tokens, grad_scale=grad_scale, last=last)
        fresh = {param: state["hessian"].clone() for param, state in self.state.items()}
        for param, state in self.state.items():
            state["hessian"].copy_(late.get(param, torch.zeros_like(state["hessian"])))
        self._late = fresh


class RefreshesOneIntervalLate(SIMUOptimizer):
    """Waits a whole interval before the first refresh."""

    @property
    def hessian_due(self):
        return any(g["num_steps"] >= g["next_refresh"] + g["hessian_interval"] - 1 for g in self.param_groups)


class IsAlwaysDue(SIMUOptimizer):
    """Never counts a refresh."""

    hessian_due = True


def forgets_the_finite_check(original):
    """Steps whatever the gradient is."""
    return lambda self, entries, groups, what: True


def replaces_nan_by_zero(original):
    """Steps on the finite rest of a gradient that is not finite."""
    return lambda *given: (entry._replace(grad=entry.grad.nan_to_num(0.0, 0.0, 0.0)) for entry in original(*given))


def skips_in_silence(original):
    """Does not count what it skipped."""
    return property(lambda self: 0)


class LoadsWithTheBaseClassOnly(SIMUOptimizer):
    """Lets the base class cast the state to the parameter's dtype."""

    def load_state_dict(self, state_dict):
        Optimizer.load_state_dict(self, state_dict)


class ForgetsTheRefreshCounter(SIMUOptimizer):
    """Is due for a refresh right after loading."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["next_refresh"] = 1


class RestartsTheSteps(SIMUOptimizer):
    """Counts steps from zero after loading."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["num_steps"] = 0


class ForgetsTheMasterWeights(SIMUOptimizer):
    """Makes new master weights from the rounded ones."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for param, neurons in zip(group["params"], group["neurons"], strict=True):
                index = torch.tensor(neurons)
                self.state[param]["master"] = param.detach().index_select(group["neuron_dim"], index).float()


def draws_another_rounding_after_loading(original):
    """Rounds stochastically with the global generator."""
    return lambda group, entry, weight: round_stochastically(weight, entry.param.dtype)


def accepts_another_selection(original):
    """Loads whatever has as many entries."""
    return lambda state_dict, groups: None


def decides_alone(original):
    """Looks for non-finite gradients in the shard of its own process only."""
    return lambda finite, entries: finite


def steps_on_its_own_part(original):
    """Multiplies the step by the number of processes, as if gradients were sums."""

    def step(group, entries, *rest):
        sharded = any(isinstance(entry.param, DTensor) for entry in entries)
        original({**group, "lr": group["lr"] * (dist.get_world_size() if sharded else 1)}, entries, *rest)

    return step


def forgets_the_damping(original):
    """Inverts the bare covariance."""
    return lambda covariance, *, damping: original(covariance, damping=1e-6)


def whitens_nothing(original):
    """Takes the plain gradient."""
    return lambda grad, neuron_factor, output_factor=None: grad


def whitens_the_outputs_with_the_neurons(original):
    """Leaves out one of the two sides."""
    return lambda grad, neuron_factor, output_factor=None: original(grad, neuron_factor)


def moves_by_its_own_length(original):
    """Forgets that a step is a share of the norm of the weights."""
    return lambda *tensors, weight_norm, **options: original(
        *tensors, weight_norm=torch.ones_like(weight_norm), **options
    )


def keeps_its_length(original):
    """Does not bring the direction to the length of one."""
    return lambda *tensors, direction_norm, **options: original(
        *tensors, direction_norm=torch.ones_like(direction_norm), **options
    )


def counts_every_position(original):
    """Takes positions into the covariance that no scored one depends on."""
    return lambda gradient: torch.ones_like(gradient[..., :1], dtype=torch.bool)


def forgets_the_covariance_before(original):
    """Takes the last covariance for the mean of all."""
    return lambda factor, *, damping: torch.zeros_like(factor)


REPLACED = {
    forgets_the_damping: "curvature.factors.damped_cholesky",
    whitens_nothing: "stepping.trust.whiten",
    whitens_the_outputs_with_the_neurons: "stepping.trust.whiten",
    moves_by_its_own_length: "stepping.trust.trust_step_",
    keeps_its_length: "stepping.trust.trust_step_",
    forgets_the_covariance_before: "curvature.factors.undamped",
    steps_beside_the_neurons: "entries.Selected.columns",
    keeps_dense_state: "stepping.state.new_state",
    keeps_a_third_moment: "stepping.state.new_state",
    forgets_to_clip: "stepping.group.clip_entries",
    decays_without_the_step_size: "stepping.group.clip_entries",
    updates_momentum_twice: "stepping.group.clip_entries",
    forgets_the_finite_check: "guard.Guard.passes",
    replaces_nan_by_zero: "curvature.updates.entries_of",
    skips_in_silence: "guard.Guard.num_stopped",
    draws_another_rounding_after_loading: "stepping.writing.rounded_to",
    accepts_another_selection: "loading.check_loadable",
    decides_alone: "guard.agreed",
    steps_on_its_own_part: "stepping.group.clip_entries",
}
"""A mutant -> the function that it replaces, in the folder of the optimizer."""


@contextmanager
def implementation(mutant: Any) -> Iterator[Any]:
    """The optimizer as a mutant makes it."""
    if mutant not in REPLACED:
        yield mutant
        return
    target = f"torch_simu.optimizer.{REPLACED[mutant]}"
    with mock.patch(target, mutant(pkgutil.resolve_name(target))):
        yield SIMUOptimizer
