"""Scores of fused experts, whose neurons no input or output of a module shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torch_simu._checks import problem
from torch_simu.layers import is_fused_experts, neuron_dim, neuron_weight

_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-3, 0.05


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


def with_neurons_times(factor: float, module: nn.Module, args: tuple[object, ...]) -> Tensor:
    """Return what fused experts give where all their neurons are multiplied by a factor.

    With 0 that is what is no neuron's: biases, and what experts pass on as it is.
    """
    with torch.no_grad():
        weight = neuron_weight(module).detach() * factor
        return cast("Tensor", functional_call(module, {"down_proj": weight}, args))


def check_linear(model: nn.Module, ids: Tensor, layers: Mapping[str, nn.Module]) -> None:
    """Raise where fused experts do something behind the down projection: half the neurons must give half the output.

    Args:
        model: A causal language model, frozen.
        ids: Some tokens. Shape: `(1, length)`.
        layers: Name -> module.

    Raises:
        ValueError: If the output of experts is not linear in their neurons, or they are called with names.
    """
    experts = {name: module for name, module in layers.items() if is_fused_experts(module)}
    if not experts:
        return
    errors: dict[str, float] = {}

    def compare(
        module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Tensor, name: str
    ) -> None:
        if name in errors:
            # A call of `with_neurons_times`.
            return
        if kwargs:
            wrong = f"Experts {name!r} are called with {list(kwargs)} by name"
            raise ValueError(problem(wrong, "arguments by position", "Leave the layer out."))
        errors[name] = 0.0
        rest, half = (with_neurons_times(factor, module, args).double() for factor in (0.0, 0.5))
        whole = output.double() - rest
        size = whole.norm().item()
        errors[name] = (half - rest - whole / 2).norm().item() / size if size else 0.0

    with ExitStack() as stack, torch.no_grad():
        for name, module in experts.items():
            stack.callback(module.register_forward_hook(partial(compare, name=name), with_kwargs=True).remove)
        model(input_ids=ids, use_cache=False)
    for name, error in errors.items():
        if error > (_TOLERANCE if neuron_weight(experts[name]).dtype.itemsize >= 4 else _LOW_PRECISION_TOLERANCE):
            wrong = f"Half the neurons of experts {name!r} give half the output but for a share of {error:.2g}"
            raise ValueError(problem(wrong, "an output that is linear in its neurons", "Leave the layer out."))
