"""SIMUOptimizer: Sophia's clipped second-order step with state for selected neurons only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from torch_simu.neurons import NeuronSelection
from torch_simu.optimizer.curvature.estimates import Estimates
from torch_simu.optimizer.curvature.updates import CurvatureUpdates
from torch_simu.optimizer.entries import Selected
from torch_simu.optimizer.groups import checked_group, complete_group, dtype_name, selected_groups
from torch_simu.optimizer.guard import Guard
from torch_simu.optimizer.loading import loading, saving
from torch_simu.optimizer.reselection import reselect
from torch_simu.optimizer.stepping.directions import Directions
from torch_simu.optimizer.stepping.fused import check_fused
from torch_simu.optimizer.stepping.group import step_group
from torch_simu.optimizer.stepping.health import health


class SIMUOptimizer(CurvatureUpdates):
    r"""Clipped second-order steps (Sophia, Gauss-Newton) on selected neurons, with state for those neurons only.

    For the selected entries $S$ of a parameter,

    $$m_S \leftarrow \beta_1 m_S + (1 - \beta_1) g_S, \qquad
      w_S \leftarrow w_S (1 - \eta\lambda) - \eta \operatorname{clip}(m_S / \max(\rho h_S, \epsilon), -c, c),$$

    and at refreshes $h_S \leftarrow \beta_2 h_S + (1 - \beta_2) \hat h_S$ with $\hat h = B \hat g^2$ (see
    `gauss_newton_loss`). Everything off $S$ stays bit-identical and has no state. With all neurons selected this is
    Sophia (Liu et al. 2023, arXiv 2305.14342); with the MLP's critical neurons it is SIMU (arXiv 2510.07822).

    With `curvature="neurons"` the step is a full matrix among the neurons instead of a diagonal: the gradient of a
    layer is multiplied by the inverse of the covariance $A$ of its selected neurons on the forget set, and moves the
    layer by a share $\eta$ of the norm of its selected weights, without a clip per entry:

    $$m \leftarrow \beta_1 m + (1 - \beta_1) \frac{G A^{-1}}{\lVert G A^{-1} \rVert}, \qquad
      W_S \leftarrow W_S (1 - \eta\lambda) - \eta\,\lVert W_S \rVert\,m.$$

    With "both" it is $D^{-1} G A^{-1}$, with $D$ the covariance of the gradients of the layer's outputs, which each
    refresh brings to a mean diagonal of one.

    Args:
        params: Parameters; `model.named_parameters()`, then `selection` says which of their entries train; or groups
            with `params`, a list `neurons` aligned with it (per parameter: None = all, [] = none, or indices) and
            `neuron_dim`, the dimension those indices count (default -1), or a tuple of dimensions, which they count
            together with the last one fastest: `(0, 2)` of fused experts counts expert after expert. With `rows` true
            the neurons of a group are outputs of their layers instead of inputs.
        lr: Step size $\eta$, the largest change of one entry per step when `clip` is 1, or of a layer as a share of its
            norm where it is whitened; a float or one-element tensor.
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
        foreach: Step all parameters with fused kernels; None: on CUDA. With covariances each layer is solved and
            stepped by itself, whatever it says.
        maximize: Ascend instead of descend.
        capturable: Let a CUDA graph that captured a step or a refresh replay it: whether gradients are finite, the
            counters and the draws of stochastic rounding are the device's; reading `hessian_due` waits for it then.
        curvature: Where the curvature comes from: `update_hessian` after a backward of `gauss_newton_loss` ("gnb"),
            `update_hutchinson` ("hutchinson"), or the square of each step's own gradient ("squared_gradient", the
            empirical Fisher of other packages: explicit, because it is none). Or `update_curvature`, from hooks: the
            covariance of the selected neurons among themselves ("neurons"), and of their layer's outputs beside it
            ("both").
        damping: What is added to the diagonal of a covariance, as a share of its mean (without its largest fiftieth).
        fused: Make each diagonal step by one Triton kernel a weight, which gathers, advances and writes the selected
            entries in one pass: for float32, bfloat16 and float16 weights on CUDA, whole or with rows or columns
            selected, and float32 or bfloat16 state. Needs triton. Off by default, because its speed has not been
            measured on a GPU yet.

    Raises:
        ValueError: If an option or index is out of bounds, `neurons` is not aligned with `params`, or `fused` is asked
            for with what the kernel does not do.
        TypeError: If an option has a wrong type.
        ImportError: If `fused` is true and triton is not installed.

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
        curvature: Literal["gnb", "hutchinson", "squared_gradient", "neurons", "both"] = "gnb",
        damping: float = 0.1,
        fused: bool = False,
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
            "damping": damping,
            "fused": fused,
            "neuron_dim": -1,
            "num_steps": 0,
            "next_refresh": 1,
        }
        self._make_own()
        super().__init__(selected_groups(params, selection), defaults)

    def _make_own(self) -> None:
        # Objects, because a wrapper may copy the attributes: both must go on with the same ones.
        self._selected, self._estimates, self._guard = Selected(), Estimates(), Guard()
        self._directions = Directions()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            complete_group(group, self.defaults)
        if "_guard" not in self.__dict__:
            self._make_own()
        for each in (self._selected, self._estimates, self._guard):
            each.clear()
        # Known now: after a step on a device the counters are there.
        if any(group["next_refresh"] > 1 for group in self.param_groups):
            self._guard.count_refresh()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with its own options and, optionally, `neurons` and `neuron_dim`.

        Raises:
            ValueError: If an option or index is out of bounds, or `neurons` is not aligned with `params`.
        """
        self._guard.rest(0)
        group = checked_group(param_group, self.defaults)
        check_fused({**self.defaults, **group})
        super().add_param_group(group)

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
        entries = [self._entries([number]) for number in range(len(self.param_groups))]
        finite = self._guard.passes(chain.from_iterable(entries), self.param_groups, "step")
        if finite is False:
            return loss
        for group, group_entries in zip(self.param_groups, entries, strict=True):
            step_group(group, group_entries, self.state, finite, self._directions)
        self._directions.clear()
        self._guard.count_step(self.param_groups)
        return loss

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
        for group in reselect(self.param_groups, self.state, selection, model):
            self.add_param_group(group)
        self._selected.clear()
        self._estimates.clear()
        self._guard.rest(0)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Any]:
        """Return health figures, reading them from the device only now.

        Returns:
            `unclipped`: per group, the share of entries whose step is not clipped (0.1 to 0.5 is healthy, Liu et al.
            2023; None before the first step, and where it is whitened). `momentum_norm` and `curvature_norm`: per
            group, the Euclidean norms. Of distributed parameters these are figures of this process's shards.
            `skipped_steps`: how many steps and refreshes a non-finite gradient stopped.
        """
        return {**health(self.param_groups, self.state), "skipped_steps": self._guard.num_stopped}

    def state_dict(self) -> dict[str, Any]:
        """Return the state, whose counters are plain numbers wherever they are kept."""
        with saving(self):
            return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, keeping the state's dtype; continues bit-identically.

        Raises:
            ValueError: If it was saved for another selection, other groups or other shapes.
        """
        with loading(self):
            super().load_state_dict(cast("dict[str, Any]", state_dict))
