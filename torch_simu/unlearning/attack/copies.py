"""ModelCopy: the one copy of a model that all attacks share, and that is as the model again before each."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torch_simu._checks import problem
from torch_simu.bitsandbytes.layers import holds_codes
from torch_simu.bitsandbytes.packing import check_codes, keep_codes_as_loaded
from torch_simu.deltas import attached_layers
from torch_simu.layers import is_neuron_layer, neuron_dim


class ModelCopy:
    """A copy in eval mode, of which everything trains but the codes of quantized layers.

    Beside codes those are the deltas, and whatever weights are floats: norms, embeddings, the head.

    Args:
        model: What is copied; it is only read.
        float32: Whether weights of half precision become float32 in the copy.

    Attributes:
        model: The copy.
        trained: Its parameters that train.
        quantized: Whether a layer holds codes.

    Raises:
        ValueError: If a parameter has no data, or 4-bit codes were packed for inference.
    """

    def __init__(self, model: PreTrainedModel, *, float32: bool = True) -> None:
        for name, param in model.named_parameters():
            if param.is_meta:
                wrong = f"Parameter {name!r} is on the meta device"
                raise ValueError(problem(wrong, "data", "Load the model without offloading."))
        check_codes(model)
        self.model = copy.deepcopy(model).eval()
        keep_codes_as_loaded(self.model)
        layers = [layer for layer in self.model.modules() if holds_codes(layer)]
        codes = {id(layer.weight) for layer in layers}
        self.quantized = bool(layers)
        self.trained: list[nn.Parameter] = []
        self._originals: list[Tensor] = []
        for original, param in zip(model.parameters(), self.model.parameters(), strict=True):
            trains = param.is_floating_point() and id(param) not in codes
            param.requires_grad_(trains)
            if trains:
                if float32 and param.dtype in (torch.float16, torch.bfloat16):
                    param.data = param.data.float()
                self.trained.append(param)
                self._originals.append(original)

    @torch.no_grad()
    def restore(self) -> None:
        """Make the copy what the model is."""
        for param, original in zip(self.trained, self._originals, strict=True):
            param.copy_(original)
            param.grad = None

    @torch.no_grad()
    def round_weights(self, rounded: Callable[[Tensor], Tensor]) -> None:
        """Round every matrix of a copy without codes; deltas are added to their weights first.

        Args:
            rounded: Maps a weight to its rounded values.
        """
        for layer in attached_layers(self.model).values():
            layer.columns.add_(layer.weight, layer.change.to(layer.weight.dtype))
            layer.fold_bias_()
            for delta in layer.deltas().values():
                delta.zero_()
        # A Conv1D holds its output channels in columns.
        turned = {
            id(layer.weight) for layer in self.model.modules() if is_neuron_layer(layer) and not neuron_dim(layer)
        }
        for param in self.trained:
            if id(param) in turned:
                param.copy_(rounded(param.T).T)
            elif param.dim() > 1:
                param.copy_(rounded(param))
