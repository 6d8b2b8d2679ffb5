"""SIMUOptimizer: Sophia's clipped second-order step with state for selected neurons only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_simu._checks import check_number, problem
from torch_simu.curvature import bartlett_diagonal
from torch_simu.neurons import NeuronSelection
from torch_simu.optimizer.groups import check_options, checked_neurons, selected_groups
from torch_simu.update import clipped_step_, clipped_step_foreach_, round_stochastically, unclipped_share

_SHAPED_STATE = ("exp_avg", "hessian", "master")


class _Entry(NamedTuple):
    """One parameter in one step: where it is in the groups, and its compact gradient."""

    param: Tensor
    number: int
    position: int
    chosen: Tensor | None
    dim: int
    grad: Tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor if self.chosen is None else tensor.index_select(self.dim, self.chosen)

    def write(self, value: Tensor) -> None:
        if self.chosen is None:
            self.param.copy_(value)
        else:
            self.param.index_copy_(self.dim, self.chosen, value)


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
            `neuron_dim`, the dimension those indices count (default -1).
        lr: Step size $\eta$, the largest change of one entry per step when `clip` is 1; a float or one-element tensor.
        betas: Decay of the momentum and of the curvature.
        rho: Curvature scale $\rho$: larger clips less.
        eps: Floor $\epsilon$ of the denominator.
        weight_decay: Decoupled decay $\lambda$ of the selected entries.
        selection: Which neurons train, with named parameters: layer `mlp` selects columns of parameter `mlp.weight`.
            Parameters of other layers do not train at all.
        clip: Bound $c$ of the ratio of momentum and curvature.
        hessian_interval: Steps between two refreshes of the curvature.
        state_dtype: Dtype of momentum and curvature, whatever the weights' dtype.
        master_weights: Keep a float32 copy of the selected entries, for bfloat16 and float16 weights.
        stochastic_rounding: Round updates of bfloat16 and float16 weights so that small ones survive on average.
        foreach: Step all parameters with fused kernels; None: on CUDA.
        maximize: Ascend instead of descend.
        capturable: Decide about non-finite gradients on the device, without a synchronization.

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
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip": clip,
            "hessian_interval": hessian_interval,
            "state_dtype": state_dtype,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
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
        group = dict(param_group)
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        # A set has no order to align with; the base class refuses it with its own message.
        group["params"] = params if isinstance(params, set) else list(params)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
        options = {**self.defaults, **group}
        check_options(options)
        group["neurons"] = checked_neurons(tensors, group.get("neurons"), options["neuron_dim"])
        super().add_param_group(group)

    @property
    def hessian_due(self) -> bool:
        """Whether the curvature should be refreshed now: after step 1, then every `hessian_interval` steps."""
        return any(group["num_steps"] >= group["next_refresh"] for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step from `.grad`; a step with a non-finite selected gradient changes nothing and says so.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What `closure` returned.

        Raises:
            RuntimeError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = [list(self._entries(number)) for number in range(len(self.param_groups))]
        finite = self._finite([entry.grad for entry in chain.from_iterable(entries)])
        if finite is False:
            self._say_skipped("step")
            return loss
        for group, group_entries in zip(self.param_groups, entries, strict=True):
            self._step_group(group, group_entries, finite)
            group["num_steps"] += 1
        return loss

    @torch.no_grad()
    def update_hessian(self, num_tokens: int | Tensor, *, grad_scale: float | Tensor | None = None) -> None:
        r"""Refresh the curvature from `.grad`, which must hold the gradient of `gauss_newton_loss`.

        $h \leftarrow \beta_2 h + (1 - \beta_2) B \hat g^2$. Call it after `loss.backward()` of that loss with the
        gradients zeroed before, and zero them again afterwards. Do not clip that gradient.

        Args:
            num_tokens: Number $B$ of positions behind the mean, as `gauss_newton_loss` returns it.
            grad_scale: Factor by which the loss was multiplied (a GradScaler's scale, say); None: 1.

        Raises:
            ValueError: If `num_tokens` or `grad_scale` is not positive.
        """
        for name, value in (("num_tokens", num_tokens), ("grad_scale", grad_scale)):
            if value is not None and not isinstance(value, Tensor):
                check_number(name, value, low_open=True)
        entries = [list(self._entries(number)) for number in range(len(self.param_groups))]
        finite = self._finite([entry.grad for entry in chain.from_iterable(entries)])
        if finite is False:
            self._say_skipped("refresh")
            return
        for group, group_entries in zip(self.param_groups, entries, strict=True):
            for entry in group_entries:
                hessian = self._state_of(group, entry)["hessian"]
                grad = entry.grad if grad_scale is None else entry.grad / grad_scale
                estimate = bartlett_diagonal(grad, cast("int", num_tokens))
                current = hessian.to(grad.dtype)
                if isinstance(finite, Tensor):
                    estimate = torch.where(finite.to(grad.device), estimate, current)
                hessian.copy_(current.lerp(estimate, 1 - group["betas"][1]))
            group["next_refresh"] = group["num_steps"] + group["hessian_interval"]

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Any]:
        """Return health figures, reading them from the device only now.

        Returns:
            `unclipped`: per group, the share of entries whose step is not clipped (None before the first step; 0.1 to
            0.5 is healthy, Liu et al. 2023). `skipped_steps`: how many steps a non-finite gradient stopped.
        """
        shares: list[float | None] = []
        for group in self.param_groups:
            weighted = [
                (unclipped_share(*pair, rho=group["rho"], eps=group["eps"], clip=group["clip"]).item(), pair[0].numel())
                for param in group["params"]
                if (pair := self._moments(param)) is not None
            ]
            total = sum(count for _, count in weighted)
            shares.append(sum(share * count for share, count in weighted) / total if total else None)
        return {"unclipped": shares, "skipped_steps": int(self._skipped)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, keeping the state's dtype; continues bit-identically.

        Raises:
            ValueError: If it was saved for another selection, other groups or other shapes.
        """
        self._check_loadable(state_dict)
        super().load_state_dict(cast("dict[str, Any]", state_dict))
        # The base class casts state to the parameter's dtype (pytorch issue 43706), which would round the curvature.
        for saved_id, _, param in self._aligned(state_dict):
            for key in _SHAPED_STATE:
                if (value := state_dict["state"].get(saved_id, {}).get(key)) is not None:
                    self.state[param][key] = value.detach().to(param.device, copy=True)

    def _reset_caches(self) -> None:
        # (group, position, device) -> (the index list it was made from, the same on the device)
        self._indices: dict[tuple[int, int, torch.device], tuple[list[int], Tensor]] = {}
        self._skipped: int | Tensor = 0

    def _entries(self, number: int) -> Iterator[_Entry]:
        group = self.param_groups[number]
        for position, (param, neurons) in enumerate(zip(group["params"], group["neurons"], strict=True)):
            if param.grad is None:
                continue
            if param.grad.layout != torch.strided:
                raise RuntimeError(problem("A gradient is sparse", "dense gradients", "Use sparse=False."))
            chosen = None if neurons is None else self._index(number, position, neurons, param.device)
            entry = _Entry(param, number, position, chosen, group["neuron_dim"], param.grad)
            # Half precision is gathered first and widened then, so that no dense copy is ever made.
            wide = torch.float64 if param.dtype == torch.float64 else torch.float32
            yield entry._replace(grad=entry.gather(param.grad).to(wide))

    def _index(self, number: int, position: int, neurons: list[int], device: torch.device) -> Tensor:
        key = (number, position, device)
        cached = self._indices.get(key)
        if cached is None or cached[0] is not neurons:
            cached = self._indices[key] = (neurons, torch.tensor(neurons, dtype=torch.int64, device=device))
        return cached[1]

    def _finite(self, grads: list[Tensor]) -> Tensor | bool:
        """Say whether all gradients are finite: a bool on the CPU, a scalar on the device where reading would wait."""
        norms = [torch.linalg.vector_norm(grad, torch.inf) for grad in grads if grad.numel()]
        if not norms:
            return True
        finite = torch.stack([norm.isfinite().to(norms[0].device) for norm in norms]).all()
        on_device = finite.is_cuda or any(group["capturable"] for group in self.param_groups)
        if on_device:
            self._skipped = self._skipped + (~finite).long()
        return finite if on_device else bool(finite)

    def _say_skipped(self, what: str) -> None:
        self._skipped += 1
        wrong = f"A selected gradient is not finite; this {what} changed nothing ({int(self._skipped)} so far)"
        warnings.warn(problem(wrong, "finite gradients", "Lower lr or check the loss."), RuntimeWarning, stacklevel=4)

    def _state_of(self, group: dict[str, Any], entry: _Entry) -> dict[str, Any]:
        state: dict[str, Any] = self.state[entry.param]
        if not state:
            on_device = entry.param.device if group["capturable"] else None
            state["step"] = torch.zeros((), dtype=torch.float32, device=on_device)
            state["exp_avg"] = torch.zeros_like(entry.grad, dtype=group["state_dtype"])
            state["hessian"] = torch.zeros_like(entry.grad, dtype=group["state_dtype"])
            if group["master_weights"] and entry.param.dtype in (torch.bfloat16, torch.float16):
                state["master"] = entry.gather(entry.param).float().clone()
        return state

    def _step_group(self, group: dict[str, Any], entries: list[_Entry], finite: Tensor | bool) -> None:
        options: dict[str, Any] = {
            "lr": group["lr"],
            "beta1": group["betas"][0],
            **{name: group[name] for name in ("rho", "eps", "weight_decay", "clip")},
        }
        work: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for entry in entries:
            state = self._state_of(group, entry)
            weight = state["master"] if "master" in state else entry.gather(entry.param)
            exp_avg, hessian = (state[key].to(entry.grad.dtype) for key in ("exp_avg", "hessian"))
            grad = -entry.grad if group["maximize"] else entry.grad
            if isinstance(finite, Tensor):
                # lerp(m, m) is m exactly, and a step of length zero keeps the weight: nothing changes, without a sync.
                grad = torch.where(finite.to(grad.device), grad, exp_avg)
            work.append((weight.to(grad.dtype), grad, exp_avg, hessian))
        if isinstance(finite, Tensor):
            options["lr"] = finite * options["lr"]
        foreach = group["foreach"] if group["foreach"] is not None else all(item[0].is_cuda for item in work)
        one_kind = len({(item[0].device, item[0].dtype) for item in work}) == 1
        if foreach and one_kind:
            clipped_step_foreach_(*map(list, zip(*work, strict=True)), **options)
        else:
            for weight, grad, exp_avg, hessian in work:
                clipped_step_(weight, grad, exp_avg, hessian, **options)
        for entry, (weight, _, exp_avg, _) in zip(entries, work, strict=True):
            state = self.state[entry.param]
            state["exp_avg"].copy_(exp_avg)
            state["step"] += 1 if finite is True else cast("Tensor", finite).to(state["step"].device)
            if weight is not entry.param:
                rounded = self._rounded(group, entry, weight)
                if isinstance(finite, Tensor):
                    # Another draw would move a weight that the step must leave alone.
                    rounded = torch.where(finite.to(rounded.device), rounded, entry.gather(entry.param))
                entry.write(rounded)

    def _rounded(self, group: dict[str, Any], entry: _Entry, weight: Tensor) -> Tensor:
        dtype = entry.param.dtype
        if not group["stochastic_rounding"] or dtype not in (torch.bfloat16, torch.float16):
            return weight.to(dtype)
        # Seeded by what the checkpoint carries, so that a resumed run draws what the unbroken one would have drawn.
        seed = group["num_steps"] * 1_000_003 + entry.number * 10_007 + entry.position
        return round_stochastically(weight, dtype, torch.Generator(weight.device).manual_seed(seed))

    def _moments(self, param: Tensor) -> tuple[Tensor, Tensor] | None:
        state = self.state.get(param)
        return (state["exp_avg"], state["hessian"]) if state and state["exp_avg"].numel() else None

    def _aligned(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            for saved_id, param in zip(saved["params"], group["params"], strict=False):
                yield saved_id, group, param

    def _check_loadable(self, state_dict: Mapping[str, Any]) -> None:
        same_model = "Make the optimizer with the selection that the state was saved for."
        for number, (saved, group) in enumerate(zip(state_dict["param_groups"], self.param_groups, strict=False)):
            for key in ("neurons", "neuron_dim"):
                if saved.get(key) != group[key]:
                    wrong = f"Group {number} of the saved state has other {key} than this optimizer"
                    raise ValueError(problem(wrong, "the same selection", same_model))
        positions = {id(param): place for place, (_, _, param) in enumerate(self._aligned(state_dict))}
        neurons = list(chain.from_iterable(group["neurons"] for group in self.param_groups))
        for saved_id, group, param in self._aligned(state_dict):
            shape = list(param.shape)
            if (chosen := neurons[positions[id(param)]]) is not None:
                shape[group["neuron_dim"]] = len(chosen)
            for key in _SHAPED_STATE:
                value = state_dict["state"].get(saved_id, {}).get(key)
                if value is not None and list(value.shape) != shape:
                    wrong = f"The saved {key} of parameter {saved_id} has shape {tuple(value.shape)}"
                    raise ValueError(problem(wrong, f"{tuple(shape)}", same_model))
