"""Presets: published second-order baselines as options of SIMUOptimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_simu._checks import check_count, check_number


def soul(
    lr: float | Tensor = 1e-4,
    betas: tuple[float, float] = (0.965, 0.99),
    rho: float = 0.04,
    weight_decay: float = 0.0,
    *,
    batch_factor: int = 5120,
) -> dict[str, Any]:
    r"""Return the options with which `SIMUOptimizer` takes the steps of SOUL's published optimizer.

    SOUL (Jia et al. 2024, arXiv 2404.18239) folds the squared *unlearning* gradient into the curvature before every
    step, updates the momentum twice with the same gradient, which is one update with $\beta_1^2$, and multiplies the
    curvature by a fixed 5120. Nearly all entries are clipped then: it is in effect sign descent. It is here to compare
    with, not to use.

    Args:
        lr: Step size.
        betas: SOUL's own decays of momentum and curvature.
        rho: SOUL's curvature scale.
        weight_decay: Decoupled decay.
        batch_factor: The fixed factor of the curvature.

    Examples:
        >>> import torch
        >>> from torch_simu import SIMUOptimizer
        >>> optimizer = SIMUOptimizer(torch.nn.Linear(2, 2).parameters(), **soul(lr=1e-5))
        >>> optimizer.defaults["curvature"], optimizer.hessian_due
        ('squared_gradient', False)
    """
    check_number("rho", rho)
    check_count("batch_factor", batch_factor)
    return {
        "lr": lr,
        "betas": (betas[0] ** 2, betas[1]),
        "rho": rho * batch_factor,
        "eps": 1e-15,
        "weight_decay": weight_decay,
        "hessian_interval": 1,
        "curvature": "squared_gradient",
    }
