"""Design: which layer each sample changes in each pass, and to which point of the path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The fractional parts of its multiples leave the smallest gaps, however many of them are taken.
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True, eq=False)
class Design:
    r"""A Latin square of layers, and points that spread evenly.

    In as many passes as there are layers each sample changes each layer once, and in each pass the samples share the
    layers evenly. The points of a layer's visits come from a golden-ratio sequence with a random start: any number of
    them covers the path, and each by itself has the density $2 (1 - \alpha)$ on $[0, 1)$.

    Attributes:
        layer: Number of the layer. Shape: `(num_layers, num_samples)`, a pass per row.
        alpha: Point of the path, float64. Shape: as `layer`.
        half: 1 or -1, in turns over the visits of a layer, float64: two halves, one as good as the other.
            Shape: as `layer`.
    """

    layer: Tensor
    alpha: Tensor
    half: Tensor

    @classmethod
    def draw(cls, num_layers: int, num_samples: int, generator: torch.Generator) -> Design:
        """Draw one.

        Args:
            num_layers: How many layers.
            num_samples: How many samples.
            generator: Source of randomness, on the CPU.

        Examples:
            >>> design = Design.draw(3, 2, torch.Generator().manual_seed(0))
            >>> design.layer.sort(0).values.tolist()
            [[0, 0], [1, 1], [2, 2]]
        """
        rank = torch.randperm(num_samples, generator=generator)
        layer = (rank + torch.arange(num_layers)[:, None]) % num_layers
        layer = torch.randperm(num_layers, generator=generator)[layer]
        start = torch.rand(num_layers, generator=generator, dtype=torch.float64)
        uniform, half = torch.zeros(2, *layer.shape, dtype=torch.float64)
        turns = torch.arange(num_samples, dtype=torch.float64)
        for number in range(num_layers):
            visits = layer == number
            uniform[visits] = (start[number] + _GOLDEN * turns) % 1.0
            half[visits] = 1.0 - 2.0 * (turns % 2)
        return cls(layer, 1.0 - (1.0 - uniform).sqrt(), half)
