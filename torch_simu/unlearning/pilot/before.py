"""Before: the model as it was, so that every try starts from it and nothing is left of the last one."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_simu.bitsandbytes.packing import let_codes_go
from torch_simu.deltas import attached_layers
from torch_simu.deltas.layer import detach
from torch_simu.layers import attention_projections, down_projections, sources_beside
from torch_simu.unlearning.config import UnlearnConfig


class Before:
    """What a run of a method may change of a model, copied to the processor's memory.

    That are the weights that it trains and the deltas of layers that have some; codes never change, and deltas that a
    run attaches are taken off again.

    Args:
        model: The model.
        config: Says what trains.
    """

    def __init__(self, model: PreTrainedModel, config: UnlearnConfig) -> None:
        self._model = model
        self._flags = [(param, param.requires_grad) for param in model.parameters()]
        self._deltas = {name: (layer.deltas(), layer.idx) for name, layer in attached_layers(model).items()}
        trained = {id(param): param for module in _trained(model, config) for param in module.parameters()}
        trained |= {id(delta): delta for deltas, _ in self._deltas.values() for delta in deltas.values()}
        self._weights = [
            (param, param.detach().to("cpu", copy=True)) for param in trained.values() if param.is_floating_point()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Make the model what it was, to the last bit."""
        attached = attached_layers(self._model)
        for name, layer in attached.items():
            if name in self._deltas:
                # A further selection puts wider ones in their place.
                deltas, layer.idx = self._deltas[name]
                for key, delta in deltas.items():
                    setattr(layer, key, delta)
            else:
                detach(layer)
        if attached and not self._deltas:
            let_codes_go(self._model)
        for param, weight in self._weights:
            param.copy_(weight)
        for param, flag in self._flags:
            param.requires_grad_(flag)


def _trained(model: PreTrainedModel, config: UnlearnConfig) -> list[nn.Module]:
    if config.where == "all":
        return [model]
    found = [] if config.where == "attention" else list(down_projections(model, config.layers).values())
    if config.units:
        found += [
            source.layer
            for each in sources_beside(model, down_projections(model, config.layers)).values()
            for source in each
        ]
    if config.where == "attention" or config.attention == "full":
        found += attention_projections(model).values()
    return found
