"""Wrong implementations of the optimizer, each with one defect that was made somewhere or could easily be made."""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer

from torch_simu import SIMUOptimizer
from torch_simu.update import round_stochastically


class DecaysEveryColumn(SIMUOptimizer):
    """Masks the gradient only, as WAGLE does: weights that have none still decay."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.mul_(1 - group["lr"] * group["weight_decay"])
        return super().step(closure)


class StepsBesideTheNeurons(SIMUOptimizer):
    """Counts neurons from one instead of zero."""

    def _index(self, number, position, neurons, device):
        group = self.param_groups[number]
        size = group["params"][position].shape[group["neuron_dim"]]
        return (super()._index(number, position, neurons, device) + 1) % size


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


class KeepsDenseState(SIMUOptimizer):
    """Keeps a mask of the layer's shape."""

    def _state_of(self, group, entry):
        state = super()._state_of(group, entry)
        state.setdefault("mask", torch.ones_like(entry.param))
        return state


class KeepsAThirdMoment(SIMUOptimizer):
    """Keeps compact state that the law does not allow."""

    def _state_of(self, group, entry):
        state = super()._state_of(group, entry)
        state.setdefault("previous", torch.zeros_like(entry.grad))
        return state


class ForgetsToClip(SIMUOptimizer):
    """Takes the full Newton step."""

    def _step_group(self, group, entries, finite):
        super()._step_group({**group, "clip": math.inf}, entries, finite)


class DecaysWithoutTheStepSize(SIMUOptimizer):
    """Multiplies the weight by one minus the decay."""

    def _step_group(self, group, entries, finite):
        super()._step_group({**group, "weight_decay": group["weight_decay"] / group["lr"]}, entries, finite)


class UpdatesMomentumTwice(SIMUOptimizer):
    """Updates the momentum twice per step, as SOUL does."""

    def _step_group(self, group, entries, finite):
        for entry in entries:
            self._state_of(group, entry)["exp_avg"].lerp_(entry.grad, 1 - group["betas"][0])
        super()._step_group(group, entries, finite)


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


class ForgetsTheFiniteCheck(SIMUOptimizer):
    """Steps whatever the gradient is."""

    def _finite(self, entries):
        return True


class ReplacesNaNByZero(SIMUOptimizer):
    """Steps on the finite rest of a gradient that is not finite."""

    def _entries(self, number, grads=None):
        return (entry._replace(grad=entry.grad.nan_to_num(0.0, 0.0, 0.0)) for entry in super()._entries(number, grads))


class SkipsInSilence(SIMUOptimizer):
    """Does not count what it skipped."""

    def _say_skipped(self, what):
        pass


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


class DrawsAnotherRoundingAfterLoading(SIMUOptimizer):
    """Rounds stochastically with the global generator."""

    def _rounded(self, group, entry, weight):
        return round_stochastically(weight, entry.param.dtype)


class AcceptsAnotherSelection(SIMUOptimizer):
    """Loads whatever has as many entries."""

    def _check_loadable(self, state_dict):
        pass
