"""Scores of fused experts, whose neurons no input or output of a module shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torch_simu.layers import neuron_dim, neuron_weight


def experts_scores(module: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> Tensor:
    r"""Return activation times gradient of each neuron of fused experts, from the gradient of their output.

    With $o = \sum_e r_e W_e a_e$ and $G$ its gradient, $\sum_d W_{edk} \, \partial \langle G, o \rangle / \partial
    W_{edk} = r_e a_{ek} (W_e^T G)_k$, which is the activation times its gradient: one backward pass by the weight gives
    all neurons of all experts, whatever goes on inside.

    Args:
        module: The experts.
        inputs: What they were called with in the clean pass. Shape of each: `(num_tokens, ...)`.
        gradient: Of the objective by their output. Shape: `(num_alphas, ..., d_model)`, with `num_tokens` between.

    Returns:
        Shape: `(num_neurons,)`, float64 on the CPU.
    """
    weight = neuron_weight(module).detach().requires_grad_()
    with torch.enable_grad():
        output = functional_call(module, {"down_proj": weight}, tuple(inputs))
    wide = torch.promote_types(weight.dtype, torch.float32)
    along = gradient.to(wide).sum(0).reshape(output.shape).to(output.dtype)
    (found,) = torch.autograd.grad(output, weight, along)
    kept = neuron_dim(module)
    assert isinstance(kept, tuple)
    return (weight.detach().to(wide) * found.to(wide)).sum(3 - kept[1]).double().flatten().cpu()


def without_neurons(module: nn.Module, args: tuple[object, ...]) -> Tensor | None:
    """Return what fused experts give where all their neurons are zero: their biases; None where they have none."""
    if not any("bias" in name for name, _ in module.named_parameters()):
        return None
    with torch.no_grad():
        return cast("Tensor", functional_call(module, {"down_proj": torch.zeros_like(neuron_weight(module))}, args))
