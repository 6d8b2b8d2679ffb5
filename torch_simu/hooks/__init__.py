"""Capture neuron activations together with their gradients, on any module."""

from torch_simu.hooks.neuron_hooks import NeuronHooks
from torch_simu.hooks.record import NeuronHookError
from torch_simu.hooks.register import register_neuron_hooks

__all__ = ["NeuronHookError", "NeuronHooks", "register_neuron_hooks"]
