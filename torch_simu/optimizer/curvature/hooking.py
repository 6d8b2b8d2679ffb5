"""covariance_hooks: hooks that see what the covariances of an optimizer need, and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_simu._checks import problem
from torch_simu.hooks import NeuronHooks, register_neuron_hooks
from torch_simu.optimizer.curvature.factors import check_side, is_delta
from torch_simu.optimizer.groups import WHITENED, selects_rows


def covariance_hooks(model: nn.Module, optimizer: Optimizer, *, recording: bool = True) -> NeuronHooks:
    """Hook every layer of which an optimizer with `curvature="neurons"` or `"both"` trains columns or rows.

    Of columns the covariance is that of their neurons, and that of all outputs beside it; of rows it is that of all
    inputs, and that of the gradients of these outputs.

    Args:
        model: The trained model.
        optimizer: A `SIMUOptimizer`.
        recording: As in `register_neuron_hooks`.

    Raises:
        ValueError: If its curvature is no covariance, or a weight that it trains is not in the model.

    Examples:
        >>> from torch_simu import NeuronSelection, SIMUOptimizer
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> groups = NeuronSelection({"2": [0, 3]}, {"2": 4}).param_groups(model, units=True)
        >>> optimizer = SIMUOptimizer(groups, curvature="both")
        >>> with covariance_hooks(model, optimizer) as hooks:
        ...     model(torch.randn(5, 3)).square().sum().backward()
        >>> optimizer.update_curvature(hooks)
        >>> hooks["0"].shape, hooks.outputs["0"].shape
        (torch.Size([3, 3]), torch.Size([2, 2]))
    """
    groups = whitened_groups(optimizer)
    if not groups:
        found = ", ".join(sorted({repr(group.get("curvature")) for group in optimizer.param_groups}))
        advice = "Take CurvatureRefresh for 'gnb'."
        raise ValueError(problem(f"The optimizer has curvature {found}", "'neurons' or 'both'", advice))
    neurons, rows = _trained(model, groups)
    both = any(group["curvature"] == "both" for group in groups)
    return register_neuron_hooks(
        model, neurons, reduce="covariance", outputs=rows if both else False, recording=recording
    )


def whitened_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the groups of an optimizer, wrapped or not, whose curvature is a covariance from hooks.

    Examples:
        >>> whitened_groups(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))]))
        []
    """
    return [group for group in optimizer.param_groups if group.get("curvature") in WHITENED]


def _trained(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return layer -> its inputs that are seen, and layer -> its outputs where these are some only, in order."""
    owners = {
        param: (name, layer) for name, layer in model.named_modules() for param in layer.parameters(recurse=False)
    }
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for group in groups:
        for param, neurons in zip(group["params"], group["neurons"], strict=True):
            # A bias has no neurons.
            if param.dim() != 2 or not param.requires_grad or neurons == []:
                continue
            if param not in owners:
                wrong = f"The optimizer trains a weight of shape {tuple(param.shape)} that is not in the model"
                raise ValueError(problem(wrong, "the model that it trains", "Make it from this model's parameters."))
            name, layer = owners[param]
            dim = group["neuron_dim"] % 2
            chosen = torch.arange(param.shape[dim]) if neurons is None else torch.tensor(neurons)
            if is_delta(param, layer):
                check_side(group, param, name, layer)
                chosen = cast("Tensor", layer.idx).to(chosen.device)[chosen]
            if selects_rows(group):
                inputs[name], outputs[name] = torch.arange(param.shape[1 - dim]), chosen
                continue
            inputs[name] = chosen
    return inputs, outputs
