"""Capture activations with their gradients on an MLP and on a convolutional network, and check the captures."""

from __future__ import annotations

import torch
from torch import nn

from torch_simu import register_neuron_hooks

torch.manual_seed(0)

# An MLP: all its linear layers are hooked, and only the first three of the four tokens of each row count.
mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 2))
tokens = torch.randn(5, 4, 8)
mask = (torch.arange(4) < 3).expand(5, 4)
with register_neuron_hooks(mlp, position_mask=mask) as hooks:
    mlp(tokens).square().sum().backward()
scores = hooks["2"]  # attribution: the sum of activation times gradient, one score per neuron
assert scores.shape == (32,)
print("The neuron that matters most:", scores.abs().argmax().item())

# Removing a neuron changes a linear read-out by exactly its attribution.
loss_with = mlp(tokens)[mask].sum()
with register_neuron_hooks(mlp, "2", position_mask=mask) as hooks:
    mlp(tokens)[mask].sum().backward()
with torch.no_grad():
    mlp[2].weight[:, 7] = 0
assert torch.allclose(loss_with - mlp(tokens)[mask].sum(), hooks["2"][7], atol=1e-4)

# Any other module: name the layers, and keep every activation and gradient.
cnn = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(inplace=True), nn.Linear(16, 10))
images = torch.randn(2, 1, 6, 6)
with register_neuron_hooks(cnn, ["3", "4"], reduce=None) as hooks:
    cnn(images).logsumexp(-1).sum().backward()
before, gradient_before = hooks["3"]  # in front of the activation function
after, gradient_after = hooks["4"]  # behind it
assert torch.equal(after, before.relu())
assert torch.equal(gradient_before, gradient_after * (before > 0))
assert not any(module._forward_pre_hooks for module in cnn.modules())
print("Captured layers:", {layer: tuple(pair.shape) for layer, pair in hooks.items()})
