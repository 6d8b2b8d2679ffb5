"""Make a language model forget chosen data and keep the rest: SIMU (arXiv 2510.07822) for PyTorch."""

from torch_simu.curvature import gauss_newton_loss
from torch_simu.neurons import NeuronSelection
from torch_simu.optimizer import SIMUOptimizer

__version__ = "0.1.0"

__all__ = [
    "NeuronSelection",
    "SIMUOptimizer",
    "gauss_newton_loss",
]
