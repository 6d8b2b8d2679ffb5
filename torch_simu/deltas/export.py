"""Write deltas back into 8-bit codes: a lossy export, which says what it lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.bitsandbytes.packing import let_codes_go
from torch_simu.deltas.attach import checked_layers
from torch_simu.deltas.layer import DeltaLayer, detach


@dataclass(frozen=True, slots=True)
class WriteBack:
    """What became of a delta in the codes.

    Attributes:
        realized: Inner product of the change that the codes made with the delta, over the delta's own: 1 where nothing
            was lost, 0 where every entry was rounded away.
        changed: Share of the selected codes that differ from before.
        clamped: Share of the selected codes that would have left the range of 8 bits.
    """

    realized: float
    changed: float
    clamped: float


def write_back(model: nn.Module) -> dict[str, WriteBack]:
    """Round the deltas of 8-bit layers into their codes, on the scales that are there, and take the deltas off.

    It is lossy: a change far below a step of the codes is rounded away. Scales and unselected codes stay as they are,
    to the last bit; rows are never quantized anew, which would change most of them. The change of a bias is added to
    it. Keep the deltas where that matters.

    Returns:
        Layer -> what became of its delta.

    Raises:
        ValueError: If no layer has a delta, or one is not an 8-bit layer; nothing is written then.

    Examples:
        >>> write_back(nn.Linear(2, 2))
        Traceback (most recent call last):
            ...
        ValueError: No layer of the model has a delta, expected at least one. Call attach_deltas first.
    """
    layers = checked_layers(model)
    for name, layer in layers.items():
        if layer.weight.dtype != torch.int8:
            wrong = f"The weight of layer {name!r} holds {layer.weight.dtype}"
            raise ValueError(problem(wrong, "8-bit codes", "Merge deltas of float layers with merge_deltas."))
    found = {}
    for name, layer in layers.items():
        found[name] = _written(layer)
        detach(layer)
    let_codes_go(model)
    return found


@torch.no_grad()
def _written(layer: DeltaLayer) -> WriteBack:
    codes, scales, columns = layer.weight.data, cast("Tensor", layer.SCB), layer.columns
    # A weight is code x scale / 127; a row without any weight has no steps.
    step = (scales / 127.0).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    if layer.rows:
        step = step[layer.idx]
    before = columns.gather(codes)
    wanted = torch.round(before.float() + layer.delta / step)
    after = wanted.clamp(-127, 127).to(torch.int8)
    columns.write_(codes, after)
    layer.fold_bias_()
    change = (after.float() - before.float()) * step
    size = layer.delta.square().sum()
    realized = (change * layer.delta).sum() / size if size > 0 else torch.tensor(1.0)
    share = (after != before).float().mean(), (wanted.abs() > 127).float().mean()
    return WriteBack(realized.item(), share[0].item(), share[1].item())
