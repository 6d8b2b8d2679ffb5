"""CurvatureUpdates: the calls by which a loop refreshes the curvature of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from torch_simu._checks import check_count, check_number, problem
from torch_simu.curvature import bartlett_diagonal
from torch_simu.hooks import NeuronHooks
from torch_simu.optimizer.counters import schedule_refresh, steps_left
from torch_simu.optimizer.curvature.estimates import Estimates, hutchinson_entries
from torch_simu.optimizer.curvature.factors import covariances, fold_factors, trained_layers, weight_norm
from torch_simu.optimizer.entries import Entry, Selected, entries_of
from torch_simu.optimizer.groups import WHITENED, refreshed_by
from torch_simu.optimizer.guard import Guard
from torch_simu.optimizer.stepping.group import refresh_group
from torch_simu.optimizer.stepping.state import state_of


class CurvatureUpdates(Optimizer):
    """What `SIMUOptimizer` knows of its curvature: when a refresh is due, and one call for each way to make it."""

    _selected: Selected
    _estimates: Estimates
    _guard: Guard

    @property
    def hessian_due(self) -> bool:
        """Whether the curvature should be refreshed now: after step 1, then every `hessian_interval` steps.

        On a GPU this reads the device where it may be so, with `capturable` always, and says what non-finite gradients
        stopped since.
        """
        if self._guard.rests():
            return False
        left = steps_left(group for group in self.param_groups if group["curvature"] != "squared_gradient")
        if isinstance(left, Tensor):
            left = int(left)
            self._guard.say()
            # A replayed step is not known here.
            self._guard.rest(0 if any(group["capturable"] for group in self.param_groups) else left)
        return left <= 0

    @torch.no_grad()
    def update_hessian(
        self, num_tokens: int | Tensor, *, grad_scale: float | Tensor | None = None, last: bool = True
    ) -> None:
        r"""Refresh the curvature from `.grad`, which must hold the gradient of `gauss_newton_loss`.

        $h \leftarrow \beta_2 h + (1 - \beta_2) B \hat g^2$. Call it after `loss.backward()` of that loss with the
        gradients zeroed before, and zero them again afterwards. Do not clip that gradient. Several micro-batches vary
        less than one: call it after each, with the gradients zeroed in between, and with `last=False` on all but the
        last; then $B \hat g^2$ is averaged over them, weighted by their positions.

        Args:
            num_tokens: Number $B$ of positions behind the mean, as `gauss_newton_loss` returns it; over all processes,
                where the gradient is that of a mean over all processes.
            grad_scale: Factor by which the loss was multiplied (a GradScaler's scale, say); None: 1.
            last: Whether this is the last micro-batch of the refresh.

        Raises:
            ValueError: If `num_tokens` or `grad_scale` is not positive, or no group takes this curvature.
        """
        for name, value in (("num_tokens", num_tokens), ("grad_scale", 1 if grad_scale is None else grad_scale)):
            if not isinstance(value, Tensor):
                check_number(name, value, low_open=True)
        numbers = refreshed_by(self.param_groups, "gnb", "update_hessian")
        entries = self._entries(numbers)
        finite = self._guard.passes(entries, self.param_groups, "refresh")
        if finite is not False:
            grads = [entry.grad if grad_scale is None else entry.grad / grad_scale for entry in entries]
            estimates = [bartlett_diagonal(grad, cast("int", num_tokens)) for grad in grads]
            self._estimates.add(entries, estimates, num_tokens, finite)
        if last:
            self._refresh(numbers)

    def update_hutchinson(self, loss: Tensor, *, generator: torch.Generator | None = None, num_probes: int = 1) -> None:
        r"""Refresh the curvature from a loss, by Hutchinson's estimator $u \odot (H u)$ with $u$ of random signs.

        It differentiates the loss twice, by the selected entries only, and leaves `.grad` alone. Unlike
        `gauss_newton_loss` it takes any loss; where it bends downwards the floor `eps` takes over.

        Args:
            loss: A scalar, not yet differentiated.
            generator: Source of the signs, on the device of the parameters.
            num_probes: How many estimates are averaged.

        Raises:
            ValueError: If no group takes this curvature, or a parameter is distributed.
            RuntimeError: If the loss cannot be differentiated twice.
        """
        check_count("num_probes", num_probes)
        numbers = refreshed_by(self.param_groups, "hutchinson", "update_hutchinson")
        draws = hutchinson_entries(
            loss, self.param_groups, numbers, self._selected, generator=generator, num_probes=num_probes
        )
        for entries in draws:
            with torch.no_grad():
                finite = self._guard.passes(entries, self.param_groups, "refresh")
                if finite is not False:
                    self._estimates.add(entries, [entry.grad for entry in entries], 1, finite)
        with torch.no_grad():
            self._refresh(numbers)

    @torch.no_grad()
    def update_curvature(
        self, hooks: NeuronHooks, *, process_group: dist.ProcessGroup | None = None, reset: bool = False
    ) -> None:
        r"""Refresh the covariances of `curvature="neurons"` and `"both"` from what hooks saw.

        $A \leftarrow \beta_2 A + (1 - \beta_2) \hat A$, with $\hat A$ the mean of $a a^T$ over the positions that a
        backward reached; the first one is taken as it is. Run the batches of a step with the hooks in place, call this
        where `hessian_due` says so, then `step`. The state keeps Cholesky factors, and the norm of the weights. Of
        a layer whose rows train it is the covariance of all inputs, and for "both" that of the gradients of its rows.

        Args:
            hooks: Of `register_neuron_hooks(model, selection, reduce="covariance")`, with `outputs=True` for "both".
            process_group: All processes of it call this; what they recorded is added up. None: the default one.
            reset: Whether the hooks forget what they recorded, each layer as it is folded in: their sums are as large
                as the factors that are made of them.

        Raises:
            ValueError: If the hooks keep something else or miss a layer or neuron that trains, or no group takes this
                curvature.
            TypeError: If `hooks` is something else.
            NeuronHookError: If no layer recorded anything.
        """
        if not isinstance(hooks, NeuronHooks):
            raise TypeError(problem(f"hooks is of type {type(hooks).__name__}", "what register_neuron_hooks returns"))
        numbers = [number for number, group in enumerate(self.param_groups) if group["curvature"] in WHITENED]
        if not numbers:
            advice = 'Make the optimizer with curvature="neurons".'
            wrong = "update_curvature was called, and no group has curvature 'neurons' or 'both'"
            raise ValueError(problem(wrong, "one that has", advice))
        both = any(self.param_groups[number]["curvature"] == "both" for number in numbers)
        if hooks.reduce != "covariance" or (both and not hooks.keeps_outputs):
            wrong = "The hooks keep no covariance" + (" of the outputs" if hooks.reduce == "covariance" else "")
            advice = f'Register them with reduce="covariance"{", outputs=True" if both else ""}.'
            raise ValueError(problem(wrong, "hooks that do", advice))
        pairs = [(self.param_groups[number], entry) for number in numbers for entry in self._weights([number])]
        layers = list(trained_layers(pairs, hooks))
        # One process makes them twice, for the guard and to fold them in, and holds those of one layer at a time;
        # several exchange them once.
        exchanged = dist.is_available() and dist.is_initialized()
        kept = list(covariances(layers, hooks, process_group)) if exchanged else None
        sides = (
            trained.entry._replace(grad=side)
            for trained, each in zip(layers, kept or covariances(layers, hooks, process_group), strict=True)
            for side in each.sides.values()
        )
        finite = self._guard.passes(sides, self.param_groups, "refresh")
        if finite is not False:
            self._guard.count_refresh()
            last = {trained.name: number for number, trained in enumerate(layers)}
            found = kept or covariances(layers, hooks, process_group)
            for number, (trained, each) in enumerate(zip(layers, found, strict=True)):
                if reset and last[trained.name] == number:
                    hooks.reset(trained.name)
                fold_factors(state_of(self.state, trained.group, trained.entry), trained, each, finite)
        if reset:
            hooks.reset()
        if finite is False:
            return
        for group, entry in pairs:
            state = state_of(self.state, group, entry)
            if "weight_norm" not in state:
                state["weight_norm"] = weight_norm(entry, layers=hooks.layers.values())
        for number in numbers:
            schedule_refresh(self.param_groups[number], finite)

    def _entries(self, numbers: Iterable[int]) -> list[Entry]:
        return list(entries_of(self.param_groups, numbers, self._selected))

    def _weights(self, numbers: Iterable[int]) -> list[Entry]:
        """Return the entries of all parameters that train, with their own values in place of a gradient."""
        values = {
            param: param.detach()
            for number in numbers
            for param, neurons in zip(
                self.param_groups[number]["params"], self.param_groups[number]["neurons"], strict=True
            )
            if param.requires_grad and (neurons is None or neurons)
        }
        return list(entries_of(self.param_groups, numbers, self._selected, values))

    def _refresh(self, numbers: list[int]) -> None:
        means, passed = self._estimates.take()
        self._guard.count_refresh()
        for number in numbers if passed is not False else ():
            refresh_group(self.param_groups[number], means, self.state, passed)
