"""Step 2: the optimizer with sparse second-order state."""

from torch_simu.optimizer.balance import GradientBalance
from torch_simu.optimizer.curvature.hooking import covariance_hooks
from torch_simu.optimizer.presets import soul
from torch_simu.optimizer.simu import SIMUOptimizer

__all__ = ["GradientBalance", "SIMUOptimizer", "covariance_hooks", "soul"]
