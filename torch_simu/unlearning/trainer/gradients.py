"""StepGradients: what becomes of the terms of an objective before a step, the same in a Trainer and any other loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_simu.optimizer import GradientBalance
from torch_simu.optimizer.curvature.hooking import whitened_groups
from torch_simu.unlearning.config import CovarianceSets
from torch_simu.unlearning.differentiate import differentiate, retain_weight
from torch_simu.unlearning.objectives import Term
from torch_simu.unlearning.trainer.covariances import CovarianceRefresh


class StepGradients:
    """Differentiates an objective; behind the last micro-batch of a step it balances, and refreshes covariances.

    `UnlearningTrainer` steps by it. In another loop call `add` for each micro-batch, then the optimizer's `step`. The
    terms are differentiated one after the other, so one graph is held at a time.

    Of a `SIMUOptimizer` with `curvature="neurons"` or `"both"` what trains is hooked from now on, see
    `CovarianceRefresh`; the end of the `with` block takes the hooks off. Any other curvature is left alone.

    Args:
        model: The trained model, as it is or wrapped for data parallelism.
        optimizer: Any optimizer, as it is or wrapped by accelerate.
        balance: Whether the forget gradient is brought to the norm of the retain gradient, see `GradientBalance`. Under
            FSDP2 each micro-batch must reduce its gradients then.
        covariance_of: Which rows covariances are of: those to "forget", or "both" sets.

    Raises:
        ValueError: As `CovarianceRefresh`.

    Examples:
        >>> import torch
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> terms = [Term("forget", -1.0, 100 * weight[0]), Term("retain", 2.0, weight[1] / 2)]
        >>> with StepGradients(nn.ParameterList([weight]), optimizer, balance=True) as gradients:
        ...     _ = gradients.add(terms)
        >>> weight.grad
        tensor([-0.5000,  1.0000])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        balance: bool = False,
        covariance_of: CovarianceSets = "both",
    ) -> None:
        self._optimizer = optimizer
        self._balance = GradientBalance(optimizer) if balance else None
        self._covariances = None
        if whitened_groups(optimizer):
            self._covariances = CovarianceRefresh(model, optimizer, sets=covariance_of)

    def add(
        self, terms: Iterable[Term], *, backward: Callable[[Tensor], None] = Tensor.backward, last: bool = True
    ) -> dict[str, tuple[float, Tensor]]:
        """Differentiate the terms on one micro-batch.

        Args:
            terms: Of an `Objective`; each is made when the one before was differentiated.
            backward: Differentiates a loss: `accelerator.backward` in a loop with accelerate.
            last: Whether the step follows: `accelerator.sync_gradients` in a loop with accelerate.

        Returns:
            Name -> (weight, loss without a graph) of each term.
        """
        at: Callable[[], AbstractContextManager[None]] = nullcontext
        beside = at
        if self._covariances is not None:
            at, beside = self._covariances.forget, self._covariances.retain
        found = differentiate(terms, balance=self._balance, at=at, beside=beside, backward=backward)
        if not last:
            return found
        if self._covariances is not None:
            # First, because what is whitened is balanced by it.
            self._covariances.before_step()
        if self._balance is not None:
            # Of accelerate, which multiplied both losses.
            scaler = getattr(self._optimizer, "scaler", None)
            scale = None if scaler is None else float(scaler.get_scale())
            self._balance.combine_(retain_weight=retain_weight(found), grad_scale=scale)
        return found

    def remove(self) -> None:
        """Take the hooks off the model for good."""
        if self._covariances is not None:
            self._covariances.remove()

    def __enter__(self) -> StepGradients:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()
