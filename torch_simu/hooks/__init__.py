"""Capture neuron activations together with their gradients, on any module."""

from torch_simu.hooks.neuron_hooks import NeuronHooks, register_neuron_hooks
from torch_simu.hooks.record import NeuronHookError

__all__ = ["NeuronHookError", "NeuronHooks", "register_neuron_hooks"]
