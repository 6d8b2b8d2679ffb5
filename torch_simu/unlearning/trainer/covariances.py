"""CovarianceRefresh: the covariances by which steps are whitened, from the rows of a step, in any loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import get_args

from torch import nn
from torch.optim import Optimizer

from torch_simu._checks import check_choice
from torch_simu.optimizer import covariance_hooks
from torch_simu.unlearning.config import CovarianceSets
from torch_simu.unlearning.refresh import find_simu_optimizer


class CovarianceRefresh:
    """Refreshes the covariances of a `SIMUOptimizer` with `curvature="neurons"` or `"both"` whenever they are due.

    Differentiate the forget term inside `forget` and the others inside `retain`, and call `before_step` before each
    step. `UnlearningTrainer` does that by itself. Several micro-batches before a step add up, also over processes, so
    the covariances are the same however a batch is split.

    What trains is seen by hooks from now on; the end of the `with` block takes them off.

    Args:
        model: The trained model, as it is or wrapped for data parallelism.
        optimizer: A `SIMUOptimizer`, as it is or wrapped by accelerate.
        sets: Which rows the covariances are of: "both", or "forget", where what runs inside `retain` does not count.

    Raises:
        TypeError: If there is no `SIMUOptimizer` in `optimizer`.
        ValueError: If its curvature is no covariance, a weight that it trains is not in the model, or `sets` is
            neither.

    Examples:
        >>> import torch
        >>> from torch_simu import SIMUOptimizer
        >>> layer = nn.Linear(3, 2)
        >>> optimizer = SIMUOptimizer([{"params": [layer.weight], "neurons": [[0, 2]]}], curvature="neurons")
        >>> with CovarianceRefresh(layer, optimizer) as covariances:
        ...     with covariances.forget():
        ...         (-layer(torch.eye(3)).sum()).backward()
        ...     with covariances.retain():
        ...         layer(torch.ones(1, 3)).sum().backward()
        ...     covariances.before_step()
        True
        >>> optimizer.state[layer.weight]["neuron_factor"].shape
        torch.Size([2, 2])
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, sets: CovarianceSets = "both") -> None:
        self._retains = check_choice("sets", sets, get_args(CovarianceSets)) == "both"
        self._optimizer = find_simu_optimizer(optimizer)
        self._hooks = covariance_hooks(model, self._optimizer, recording=False)

    @contextmanager
    def forget(self) -> Iterator[None]:
        """Make and differentiate the forget term in here; it is recorded in steps where a refresh is due."""
        with self._hooks.recording() if self._optimizer.hessian_due else nullcontext():
            yield

    @contextmanager
    def retain(self) -> Iterator[None]:
        """Make and differentiate a term of the retain rows in here; it is recorded where it counts, too."""
        with self._hooks.recording() if self._retains and self._optimizer.hessian_due else nullcontext():
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
        self._optimizer.update_curvature(self._hooks, reset=True)
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
