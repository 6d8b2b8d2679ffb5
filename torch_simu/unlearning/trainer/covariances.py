"""CovarianceRefresh: the covariances by which steps are whitened, from the forget rows of a step, in any loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_simu._checks import problem
from torch_simu.hooks import register_neuron_hooks
from torch_simu.optimizer.groups import WHITENED
from torch_simu.unlearning.refresh import find_simu_optimizer


class CovarianceRefresh:
    """Refreshes the covariances of a `SIMUOptimizer` with `curvature="neurons"` or `"both"` whenever they are due.

    Differentiate the forget term inside `forget`, and call `before_step` in front of each step. `UnlearningTrainer`
    does both by itself. Several micro-batches before a step add up, also over processes, so the covariances are the
    same however a batch is split.

    What trains is seen by hooks from now on; the end of the `with` block takes them off.

    Args:
        model: The trained model, as it is or wrapped for data parallelism.
        optimizer: A `SIMUOptimizer`, as it is or wrapped by accelerate.

    Raises:
        TypeError: If there is no `SIMUOptimizer` in `optimizer`.
        ValueError: If its curvature is no covariance, or a weight that it trains is not in the model.

    Examples:
        >>> from torch_simu import SIMUOptimizer
        >>> layer = nn.Linear(3, 2)
        >>> optimizer = SIMUOptimizer([{"params": [layer.weight], "neurons": [[0, 2]]}], curvature="neurons")
        >>> with CovarianceRefresh(layer, optimizer) as covariances:
        ...     with covariances.forget():
        ...         layer(torch.eye(3)).sum().backward()
        ...     covariances.before_step()
        True
        >>> optimizer.state[layer.weight]["neuron_factor"].shape
        torch.Size([2, 2])
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._optimizer = find_simu_optimizer(optimizer)
        groups = whitened_groups(self._optimizer)
        if not groups:
            found = ", ".join(sorted({repr(group["curvature"]) for group in self._optimizer.param_groups}))
            advice = "Take CurvatureRefresh for 'gnb'."
            raise ValueError(problem(f"The optimizer has curvature {found}", "'neurons' or 'both'", advice))
        self._hooks = register_neuron_hooks(
            model,
            _trained_neurons(model, groups),
            reduce="covariance",
            outputs=any(group["curvature"] == "both" for group in groups),
            recording=False,
        )

    @contextmanager
    def forget(self) -> Iterator[None]:
        """Make and differentiate the forget term in here; it is recorded in steps where a refresh is due."""
        if not self._optimizer.hessian_due:
            yield
            return
        with self._hooks.recording():
            yield

    def before_step(self) -> bool:
        """Refresh the covariances if they are due, behind the last micro-batch of a step.

        All processes must call it.

        Returns:
            Whether they were due.

        Raises:
            NeuronHookError: If nothing was differentiated inside `forget`.
        """
        if not self._optimizer.hessian_due:
            return False
        self._optimizer.update_curvature(self._hooks)
        self._hooks.reset()
        return True

    def remove(self) -> None:
        """Take the hooks off the model for good."""
        self._hooks.remove()

    def __enter__(self) -> CovarianceRefresh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def whitened_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the groups of an optimizer, wrapped or not, whose curvature is a covariance from hooks.

    Examples:
        >>> whitened_groups(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))]))
        []
    """
    return [group for group in optimizer.param_groups if group.get("curvature") in WHITENED]


def _trained_neurons(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return layer -> its neurons that train, in order, of all weights in some groups."""
    owners = {
        param: (name, layer) for name, layer in model.named_modules() for param in layer.parameters(recurse=False)
    }
    found: dict[str, Tensor] = {}
    for group in groups:
        for param, neurons in zip(group["params"], group["neurons"], strict=True):
            # A bias has no neurons.
            if param.dim() != 2 or not param.requires_grad or neurons == []:
                continue
            if param not in owners:
                wrong = f"The optimizer trains a weight of shape {tuple(param.shape)} that is not in the model"
                raise ValueError(problem(wrong, "the model that it trains", "Make it from this model's parameters."))
            name, layer = owners[param]
            columns = torch.arange(param.shape[group["neuron_dim"]]) if neurons is None else torch.tensor(neurons)
            if param is getattr(layer, "delta", None):
                columns = cast("Tensor", layer.idx).to(columns.device)[columns]
            found[name] = columns
    return found
