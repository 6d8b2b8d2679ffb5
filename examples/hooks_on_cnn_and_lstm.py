"""Score the channels of a convolutional network and the input features of an LSTM, and check the scores."""

from __future__ import annotations

import torch
from torch import nn

from torch_simu import register_neuron_hooks

torch.manual_seed(0)

# In front of a convolution a neuron is a channel: the score sums over the images and all their pixels.
cnn = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 10))
images = torch.randn(5, 1, 8, 8)
with register_neuron_hooks(cnn, ["2"]) as hooks:
    logits = cnn(images)
    logits[:, 3].sum().backward()
assert hooks["2"].shape == (6,)
print("Channels by how much they support class 3:", hooks["2"].argsort(descending=True).tolist())

# Behind this convolution all is linear, so silencing a channel takes away exactly its score.
with torch.no_grad():
    cnn[2].weight[:, 2] = 0
    assert torch.allclose(logits[:, 3].sum() - cnn(images)[:, 3].sum(), hooks["2"][2], atol=1e-4)

# A mask says which pixels count: here the left half of the 6 x 6 pixels in front of the second convolution.
left = (torch.arange(6) < 3).expand(5, 6, 6)
halves = []
for mask in (left, ~left):
    with register_neuron_hooks(cnn, ["2"], position_mask=mask) as hooks:
        cnn(images)[:, 3].sum().backward()
    halves.append(hooks["2"])
with register_neuron_hooks(cnn, ["2"]) as hooks:
    cnn(images)[:, 3].sum().backward()
assert torch.allclose(sum(halves), hooks["2"], atol=1e-5)

# An LSTM is one layer, whose neurons are its input features; padding behind the end of a row does not count.
embed, lstm, head = nn.Embedding(20, 12), nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 2)
reader = nn.ModuleDict({"embed": embed, "lstm": lstm, "head": head}).requires_grad_(False)
ids, lengths = torch.randint(20, (3, 7)), torch.tensor([7, 4, 2])
real = torch.arange(7) < lengths[:, None]
with register_neuron_hooks(reader, ["lstm", "head"], reduce=None) as hooks:
    hooks.position_mask = real
    states, _ = lstm(embed(ids))
    head(states)[real].logsumexp(-1).sum().backward()
activation, gradient = hooks["lstm"]
assert torch.equal(activation, embed(ids)[real])
print("Layers, kept positions and neurons:", {layer: tuple(pair.shape[1:]) for layer, pair in hooks.items()})
assert not any(module._forward_pre_hooks for module in (*cnn.modules(), *reader.modules()))
