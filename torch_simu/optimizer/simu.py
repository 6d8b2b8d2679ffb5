"""SIMUOptimizer: Sophia's clipped second-order step with state for selected neurons only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from torch_simu._checks import check_count, check_number, problem
from torch_simu.curvature import bartlett_diagonal, hutchinson_estimates
from torch_simu.neurons import NeuronSelection
from torch_simu.optimizer.entries import Entry, agreed, aligned, check_unsharded, local
from torch_simu.optimizer.estimates import Estimates
from torch_simu.optimizer.groups import checked_group, dtype_name, selected_groups
from torch_simu.optimizer.loading import aligned_params, check_loadable, restored
from torch_simu.optimizer.reselection import join, reselected_groups, reselected_state
from torch_simu.optimizer.stepping import fold, health, new_state, rounded_to, step_entries


class SIMUOptimizer(Optimizer):
    r"""Clipped second-order steps (Sophia, Gauss-Newton) on selected neurons, with state for those neurons only.

    For the selected entries $S$ of a parameter,

    $$m_S \leftarrow \beta_1 m_S + (1 - \beta_1) g_S, \qquad
      w_S \leftarrow w_S (1 - \eta\lambda) - \eta \operatorname{clip}(m_S / \max(\rho h_S, \epsilon), -c, c),$$

    and at refreshes $h_S \leftarrow \beta_2 h_S + (1 - \beta_2) \hat h_S$ with $\hat h = B \hat g^2$ (see
    `gauss_newton_loss`). Everything off $S$ stays bit-identical and has no state. With all neurons selected this is
    Sophia (Liu et al. 2023, arXiv 2305.14342); with the MLP's critical neurons it is SIMU (arXiv 2510.07822).

    Args:
        params: Parameters; `model.named_parameters()`, then `selection` says which of their entries train; or groups
            with `params`, a list `neurons` aligned with it (per parameter: None = all, [] = none, or indices) and
            `neuron_dim`, the dimension those indices count (default -1), or a tuple of dimensions, which they count
            together with the last one fastest: `(0, 2)` of fused experts counts expert after expert.
        lr: Step size $\eta$, the largest change of one entry per step when `clip` is 1; a float or one-element tensor.
        betas: Decay of the momentum and of the curvature.
        rho: Curvature scale $\rho$: larger clips less.
        eps: Floor $\epsilon$ of the denominator.
        weight_decay: Decoupled decay $\lambda$ of the selected entries.
        selection: Which neurons train, with named parameters: layer `mlp` selects columns of parameter `mlp.weight`.
            Parameters of other layers do not train at all.
        clip: Bound $c$ of the ratio of momentum and curvature.
        hessian_interval: Steps between two refreshes of the curvature.
        state_dtype: Dtype of momentum and curvature, whatever the weights' dtype; `torch.uint8`, for whole parameters
            only, keeps them as 8-bit blocks through bitsandbytes.
        master_weights: Keep a float32 copy of the selected entries, for bfloat16 and float16 weights.
        stochastic_rounding: Round updates of bfloat16 and float16 weights so that small ones survive on average.
        foreach: Step all parameters with fused kernels; None: on CUDA.
        maximize: Ascend instead of descend.
        capturable: Decide about non-finite gradients on the device, without a synchronization.
        curvature: Where the curvature comes from: `update_hessian` after a backward of `gauss_newton_loss` ("gnb"),
            `update_hutchinson` ("hutchinson"), or the square of each step's own gradient ("squared_gradient", the
            empirical Fisher of other packages: explicit, because it is none).

    Raises:
        ValueError: If an option or index is out of bounds, or `neurons` is not aligned with `params`.
        TypeError: If an option has a wrong type.

    Examples:
        >>> layer = torch.nn.Linear(4, 2)
        >>> before = layer.weight.detach().clone()
        >>> optimizer = SIMUOptimizer([{"params": [layer.weight], "neurons": [[1, 3]]}], lr=0.1)
        >>> layer(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> (layer.weight != before).any(dim=0)
        tensor([False,  True, False,  True])
        >>> optimizer.state[layer.weight]["exp_avg"].shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        selection: NeuronSelection | None = None,
        clip: float = 1.0,
        hessian_interval: int = 10,
        state_dtype: torch.dtype = torch.float32,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        curvature: Literal["gnb", "hutchinson", "squared_gradient"] = "gnb",
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip": clip,
            "hessian_interval": hessian_interval,
            "state_dtype": dtype_name(state_dtype),
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "curvature": curvature,
            "neuron_dim": -1,
            # Host counters in the groups, so that every way of saving and loading an optimizer carries them.
            "num_steps": 0,
            "next_refresh": 1,
        }
        self._reset_caches()
        super().__init__(params if selection is None else selected_groups(params, selection), defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)
        self._reset_caches()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with its own options and, optionally, `neurons` and `neuron_dim`.

        Raises:
            ValueError: If an option or index is out of bounds, or `neurons` is not aligned with `params`.
        """
        super().add_param_group(checked_group(param_group, self.defaults))

    @property
    def hessian_due(self) -> bool:
        """Whether the curvature should be refreshed now: after step 1, then every `hessian_interval` steps."""
        return any(
            group["num_steps"] >= group["next_refresh"]
            for group in self.param_groups
            if group["curvature"] != "squared_gradient"
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step from `.grad`; a step with a non-finite selected gradient changes nothing and says so.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What `closure` returned.

        Raises:
            RuntimeError: If a gradient is sparse.
            ValueError: If a distributed parameter is sharded along its neurons.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = [list(self._entries(number)) for number in range(len(self.param_groups))]
        finite = self._finite(list(chain.from_iterable(entries)))
        if finite is False:
            self._say_skipped("step")
            return loss
        for group, group_entries in zip(self.param_groups, entries, strict=True):
            if group["curvature"] == "squared_gradient" and group["num_steps"] + 1 >= group["next_refresh"]:
                for entry in group_entries:
                    fold(group, self._state_of(group, entry), entry.grad.square(), finite)
                group["next_refresh"] = group["num_steps"] + 1 + group["hessian_interval"]
            self._step_group(group, group_entries, finite)
            group["num_steps"] += 1
        return loss

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
        for name, value in (("num_tokens", num_tokens), ("grad_scale", grad_scale)):
            if value is not None and not isinstance(value, Tensor):
                check_number(name, value, low_open=True)
        numbers = self._refreshed_by("gnb", "update_hessian")
        entries = list(chain.from_iterable(self._entries(number) for number in numbers))
        finite = self._finite(entries)
        if finite is False:
            self._say_skipped("refresh")
        for entry in entries if finite is not False else ():
            grad = entry.grad if grad_scale is None else entry.grad / grad_scale
            self._estimates.add(entry, bartlett_diagonal(grad, cast("int", num_tokens)), num_tokens, finite)
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
        numbers = self._refreshed_by("hutchinson", "update_hutchinson")
        params = [param for number in numbers for param in self.param_groups[number]["params"] if param.requires_grad]
        if any(isinstance(param, DTensor) for param in params):
            advice = 'Use curvature="gnb", which needs one backward only.'
            raise ValueError(problem("A parameter of update_hutchinson is distributed", "local ones", advice))

        def entries(grads: Sequence[Tensor]) -> list[Entry]:
            found = dict(zip(params, grads, strict=True))
            return [entry for number in numbers for entry in self._entries(number, found)]

        def gather(grads: Sequence[Tensor]) -> list[Tensor]:
            return [entry.grad for entry in entries(grads)]

        for found in hutchinson_estimates(loss, params, gather, generator=generator, num_probes=num_probes):
            with torch.no_grad():
                places = entries([param.detach() for param in params])
                estimates = [entry._replace(grad=grad) for entry, grad in zip(places, found, strict=True)]
                finite = self._finite(estimates)
                if finite is False:
                    self._say_skipped("refresh")
                for entry in estimates if finite is not False else ():
                    self._estimates.add(entry, entry.grad, 1, finite)
        with torch.no_grad():
            self._refresh(numbers)

    @torch.no_grad()
    def change_selection(self, selection: NeuronSelection, model: nn.Module) -> None:
        """Train other neurons from now on: those in both keep their state, new ones start at zero, others lose it.

        Parameters that train whole (the attention projections, say) are left as they are; a layer not trained before
        joins a group, with its options. The curvature is due for a refresh at once.

        Args:
            selection: The neurons to train.
            model: The model whose parameters this optimizer holds.

        Raises:
            ValueError: If the model holds none of the optimizer's parameters, or a layer trains whole already.
            TypeError: If `selection` or `model` is something else.
        """
        changed, joining = reselected_groups(self.param_groups, selection, model)
        for number, neurons in changed.items():
            group = self.param_groups[number]
            for param, old, new in zip(group["params"], group["neurons"], neurons, strict=True):
                if new is not None and self.state.get(param):
                    self.state[param] = reselected_state(self.state[param], param, old, new, group["neuron_dim"])
            group["neurons"] = neurons
            group["next_refresh"] = group["num_steps"]
        for new_group in join(self.param_groups, joining):
            self.add_param_group(new_group)
        self._indices.clear()
        self._estimates.clear()

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Any]:
        """Return health figures, reading them from the device only now.

        Returns:
            `unclipped`: per group, the share of entries whose step is not clipped (None before the first step; 0.1 to
            0.5 is healthy, Liu et al. 2023). `momentum_norm` and `curvature_norm`: per group, the Euclidean norms.
            Of distributed parameters these are figures of this process's shards. `skipped_steps`: how many steps and
            refreshes a non-finite gradient stopped.
        """
        figures = [
            health(group, [state for param in group["params"] if (state := self.state.get(param))])
            for group in self.param_groups
        ]
        columns = zip(("unclipped", "momentum_norm", "curvature_norm"), zip(*figures, strict=True), strict=True)
        return {**{name: list(column) for name, column in columns}, "skipped_steps": int(self._skipped)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, keeping the state's dtype; continues bit-identically.

        Raises:
            ValueError: If it was saved for another selection, other groups or other shapes.
        """
        self._check_loadable(state_dict)
        super().load_state_dict(cast("dict[str, Any]", state_dict))
        # The base class casts state to the parameter's dtype (pytorch issue 43706), which would round the curvature.
        for saved_id, group, param, neurons in aligned_params(state_dict, self.param_groups):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if key != "step":
                    self.state[param][key] = restored(value, param, neurons, group["neuron_dim"])
        self._estimates.clear()

    def _reset_caches(self) -> None:
        # (group, position, device) -> (the index list it was made from, the same on the device)
        self._indices: dict[tuple[int, int, torch.device], tuple[list[int], Tensor]] = {}
        self._estimates = Estimates()
        self._skipped: int | Tensor = 0

    def _entries(self, number: int, grads: Mapping[Tensor, Tensor] | None = None) -> Iterator[Entry]:
        group = self.param_groups[number]
        for position, (param, neurons) in enumerate(zip(group["params"], group["neurons"], strict=True)):
            grad = param.grad if grads is None else grads.get(param)
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(problem("A gradient is sparse", "dense gradients", "Use sparse=False."))
            chosen = None
            if neurons is not None:
                check_unsharded(param, group["neuron_dim"], f"Parameter {position} of group {number}")
                chosen = self._index(number, position, neurons, local(param).device)
            entry = Entry(param, number, position, chosen, group["neuron_dim"], grad)
            # Half precision is gathered first and widened then, so that no dense copy is ever made.
            wide = torch.float64 if param.dtype == torch.float64 else torch.float32
            yield entry._replace(grad=entry.gather(aligned(grad, param)).to(wide))

    def _index(self, number: int, position: int, neurons: list[int], device: torch.device) -> Tensor:
        key = (number, position, device)
        cached = self._indices.get(key)
        if cached is None or cached[0] is not neurons:
            cached = self._indices[key] = (neurons, torch.tensor(neurons, dtype=torch.int64, device=device))
        return cached[1]

    def _finite(self, entries: list[Entry]) -> Tensor | bool:
        """Say whether all gradients are finite: a bool on the CPU, a scalar on the device where reading would wait."""
        # Both are NaN where an entry is; one vectorized pass, unlike a norm.
        bounds = [bound for entry in entries if entry.grad.numel() for bound in torch.aminmax(entry.grad)]
        finite = torch.tensor(True)
        if bounds:
            finite = torch.stack([bound.isfinite().to(bounds[0].device) for bound in bounds]).all()
        finite = agreed(finite, entries)
        on_device = finite.is_cuda or any(group["capturable"] for group in self.param_groups)
        if on_device:
            self._skipped = self._skipped + (~finite).long()
        return finite if on_device else bool(finite)

    def _say_skipped(self, what: str) -> None:
        self._skipped += 1
        wrong = f"A selected gradient is not finite; this {what} changed nothing ({int(self._skipped)} so far)"
        warnings.warn(problem(wrong, "finite gradients", "Lower lr or check the loss."), RuntimeWarning, stacklevel=4)

    def _state_of(self, group: dict[str, Any], entry: Entry) -> dict[str, Any]:
        if not self.state[entry.param]:
            self.state[entry.param] = new_state(group, entry)
        return cast("dict[str, Any]", self.state[entry.param])

    def _refreshed_by(self, curvature: str, method: str) -> list[int]:
        numbers = [number for number, group in enumerate(self.param_groups) if group["curvature"] == curvature]
        if not numbers:
            wrong = f"{method} was called, and no group has curvature={curvature!r}"
            raise ValueError(problem(wrong, "one that has", f"Make the optimizer with curvature={curvature!r}."))
        return numbers

    def _refresh(self, numbers: list[int]) -> None:
        taken = self._estimates.take()
        for entry, mean, finite in taken:
            group = self.param_groups[entry.number]
            fold(group, self._state_of(group, entry), mean, finite)
        # A refresh whose every gradient was not finite is still due.
        for number in numbers if taken else ():
            group = self.param_groups[number]
            group["next_refresh"] = group["num_steps"] + group["hessian_interval"]

    def _step_group(self, group: dict[str, Any], entries: list[Entry], finite: Tensor | bool) -> None:
        states = [self._state_of(group, entry) for entry in entries]
        step_entries(group, entries, states, finite, lambda entry, weight: self._rounded(group, entry, weight))

    def _rounded(self, group: dict[str, Any], entry: Entry, weight: Tensor) -> Tensor:
        return rounded_to(group, entry, weight)

    def _check_loadable(self, state_dict: Mapping[str, Any]) -> None:
        check_loadable(state_dict, self.param_groups)
