"""Make a language model forget chosen data and keep the rest: SIMU (arXiv 2510.07822) for PyTorch."""

from torch_simu.attribution import Attribution, attribute_neurons
from torch_simu.curvature import gauss_newton_loss
from torch_simu.deltas import attach_deltas, detach_deltas, merge_deltas
from torch_simu.hooks import NeuronHooks, register_neuron_hooks
from torch_simu.neurons import NeuronSelection
from torch_simu.optimizer import SIMUOptimizer
from torch_simu.patch import NeuronPatch

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "NeuronHooks",
    "NeuronPatch",
    "NeuronSelection",
    "SIMUOptimizer",
    "attach_deltas",
    "attribute_neurons",
    "detach_deltas",
    "gauss_newton_loss",
    "merge_deltas",
    "register_neuron_hooks",
]
