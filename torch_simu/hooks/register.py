"""register_neuron_hooks: capture neuron activations together with their gradients, on any module."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Literal, cast

import torch
from torch import Tensor, nn

from torch_simu._checks import check_choice, check_count, problem
from torch_simu.bitsandbytes.packing import codes_as_loaded
from torch_simu.hooks.neuron_hooks import NeuronHooks
from torch_simu.hooks.record import SUMS, Reduction
from torch_simu.layers import Selector, is_fused_experts, is_neuron_layer, select_layers


def register_neuron_hooks(
    module: nn.Module,
    select: Selector | None = None,
    *,
    arg: int | str = 0,
    reduce: Literal["attribution", "act", "grad", "sq", "covariance"] | Reduction | None = "attribution",
    position_mask: Tensor | None = None,
    accum_dtype: torch.dtype = torch.float32,
    outputs: bool | Mapping[str, Tensor] = False,
    recording: bool = True,
) -> NeuronHooks:
    r"""Capture what flows into layers, and the gradient that flows back, for as long as the hooks are registered.

    A *neuron* is one input feature of a layer: an entry of the last dimension of its input, but in front of a
    convolution (`nn.Conv1d` to `nn.ConvTranspose3d`) a channel. A *position* is an entry of all other dimensions:
    batch and token, or batch and pixel.
    With $a_{pk}$ the activation of neuron $k$ at position $p$ and $g_{pk}$ the gradient of whatever `backward` is
    called on with respect to it, *as this layer uses it* (other consumers of the same tensor do not count), the sums
    over positions, calls and backward passes are:

    | `reduce` | `hooks[layer]` | shape |
    |---|---|---|
    | `"attribution"` | $\sum_p a_{pk} g_{pk}$ | `(num_neurons,)` |
    | `"act"` | $\sum_p a_{pk}$ | `(num_neurons,)` |
    | `"grad"` | $\sum_p g_{pk}$ | `(num_neurons,)` |
    | `"sq"` | $\sum_p (a_{pk} g_{pk})^2$ | `(num_neurons,)` |
    | `"covariance"` | $\sum_p a_{pk} a_{pl}$ over positions that a backward reaches | `(num_neurons, num_neurons)` |
    | `None` | every $a$ and $g$, in the order of the calls | `(2, num_positions, num_neurons)` |
    | a callable | the sum of what it returns for each call | as it returns |

    The model computes the same outputs and parameter gradients as before, and nothing is written on modules or
    parameters but the hooks, which go when the `with` block ends, however it ends.

    Args:
        module: Any module: frozen, quantized, checkpointed, wrapped or not. Code inside `torch.compile` runs no hooks.
        select: Which layers, as in `torch_simu.layers.select_layers`. None: the MLP down projections of a transformers
            model, else all linear layers inside `module`, or `module` itself, named `""`, when it holds no others. Of a
            `NeuronSelection` a covariance is that of its neurons only, in its order.
        arg: Which argument of the layers' `forward` is captured, by position or by name, however it is passed.
        reduce: What to keep, see above. A callable gets both tensors in the dtype of the activations.
        position_mask: Which positions count, the same for every layer; `hooks.position_mask` sets it per batch.
            Shape: that of the input without its neurons, as `(batch, num_tokens)`, or `(batch, height, width)` in
            front of a convolution.
        accum_dtype: Dtype of the named sums, and of the products in them.
        outputs: Beside the covariance, sum the products of the gradients with respect to what the layers return:
            `hooks.outputs[layer]`, of shape `(d_model, d_model)`. A mapping does so, too, and says for some layers of
            which outputs alone, in order.
        recording: Whether to record at once; if not, only what runs inside `hooks.recording()` counts.

    Returns:
        A mapping layer name -> tensor and a context manager. It stays readable after the block.

    Raises:
        ValueError: If nothing is selected, `reduce` is unknown, `arg` is negative, `accum_dtype` is not floating,
            `outputs` is asked for with another `reduce` or of another layer, or 4-bit codes were packed for inference,
            which pass no gradient on.
        TypeError: If `reduce`, `arg` or `position_mask` is of a wrong type.
        KeyError: If a selected name is not in the module.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> with register_neuron_hooks(layer, reduce=None) as hooks:
        ...     (3 * layer(torch.tensor([[1.0, 2.0]]))).sum().backward()
        >>> activation, gradient = hooks[""]
        >>> activation, gradient
        (tensor([[1., 2.]]), tensor([[3., 3.]]))
    """
    if isinstance(arg, bool) or not isinstance(arg, int | str):
        raise TypeError(problem(f"arg is {arg!r}", "the position or the name of an argument of forward"))
    if isinstance(arg, int):
        check_count("arg", arg, low=0)
    if isinstance(reduce, str):
        check_choice("reduce", reduce, SUMS)
    elif reduce is not None and not callable(reduce):
        raise TypeError(problem(f"reduce is {reduce!r}", f"one of {', '.join(map(repr, SUMS))}, None or a callable"))
    if not accum_dtype.is_floating_point:
        raise ValueError(problem(f"accum_dtype is {accum_dtype}", "a floating-point dtype"))
    if outputs is not False and reduce != "covariance":
        raise ValueError(problem(f"outputs is given with reduce={reduce!r}", 'reduce="covariance"'))
    layers = _selected(module, select)
    if not isinstance(outputs, bool) and (other := [name for name in outputs if name not in layers]):
        raise ValueError(problem(f"outputs names layer {other[0]!r}", f"layers that are hooked: {list(layers)}"))
    neurons = cast("Mapping[str, Tensor]", select) if isinstance(select, Mapping) and reduce == "covariance" else {}
    with ExitStack() as codes:
        codes.enter_context(codes_as_loaded(module))
        hooks = NeuronHooks(
            layers, arg, reduce, position_mask, accum_dtype, neurons, outputs=outputs, recording=recording
        )
        hooks._codes = codes.pop_all()
    return hooks


def _selected(module: nn.Module, select: Selector | None) -> dict[str, nn.Module]:
    if select is not None:
        return select_layers(module, select)
    if next(module.children(), None) is None:
        return {"": module}
    if hasattr(getattr(module, "config", None), "model_type"):
        found = select_layers(module)
        for name, layer in found.items():
            if is_fused_experts(layer):
                advice = (
                    "Use attribute_neurons, or name layers with select=; of the experts it captures the hidden states."
                )
                wrong = f"The neurons of layer {name!r} are inside experts fused into one parameter"
                raise ValueError(problem(wrong, "layers whose inputs are neurons", advice))
        return found
    return select_layers(module, lambda _, inner: is_neuron_layer(inner))
