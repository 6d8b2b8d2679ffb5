"""register_neuron_hooks: capture neuron activations together with their gradients, on any module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_simu._checks import check_choice, check_count, problem
from torch_simu.bitsandbytes.packing import codes_as_loaded
from torch_simu.hooks.record import SUMS, LayerRecord, NeuronHookError, Reduction
from torch_simu.hooks.tap import Arguments, InputTap
from torch_simu.layers import Selector, is_fused_experts, is_neuron_layer, select_layers


def register_neuron_hooks(
    module: nn.Module,
    select: Selector | None = None,
    *,
    arg: int | str = 0,
    reduce: Literal["attribution", "act", "grad", "sq"] | Reduction | None = "attribution",
    position_mask: Tensor | None = None,
    accum_dtype: torch.dtype = torch.float32,
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
    | `None` | every $a$ and $g$, in the order of the calls | `(2, num_positions, num_neurons)` |
    | a callable | the sum of what it returns for each call | as it returns |

    The model computes the same outputs and parameter gradients as before, and nothing is written on modules or
    parameters but the hooks, which go when the `with` block ends, however it ends.

    Args:
        module: Any module: frozen, quantized, checkpointed, wrapped or not. Code inside `torch.compile` runs no hooks.
        select: Which layers, as in `torch_simu.layers.select_layers`. None: the MLP down projections of a transformers
            model, else all linear layers inside `module`, or `module` itself, named `""`, when it holds no others.
        arg: Which argument of the layers' `forward` is captured, by position or by name, however it is passed.
        reduce: What to keep, see above. A callable gets both tensors in the dtype of the activations.
        position_mask: Which positions count, the same for every layer; `hooks.position_mask` sets it per batch.
            Shape: that of the input without its neurons, as `(batch, num_tokens)`, or `(batch, height, width)` in
            front of a convolution.
        accum_dtype: Dtype of the four named sums, and of the products in them.

    Returns:
        A mapping layer name -> tensor and a context manager. It stays readable after the block.

    Raises:
        ValueError: If nothing is selected, `reduce` is unknown, `arg` is negative, `accum_dtype` is not floating, or
            4-bit codes were packed for inference, which pass no gradient on.
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
    layers = _selected(module, select)
    with ExitStack() as codes:
        codes.enter_context(codes_as_loaded(module))
        hooks = NeuronHooks(layers, arg, reduce, position_mask, accum_dtype)
        hooks._codes = codes.pop_all()
    return hooks


class NeuronHooks(Mapping[str, Tensor]):
    """What `register_neuron_hooks` returns: layer name -> what was captured there.

    Reading a layer that recorded nothing raises `NeuronHookError` with the likely causes, because zeros would look like
    a result. Not a number in, not a number out: nothing is filtered. Values that were read do not change later.

    Each backward counts: two of them through one graph (`retain_graph`) count twice. Under activation checkpointing a
    layer counts once, but its forward runs again in the backward: keep a forward and its backward on the same side of
    `pause` and `remove`, or torch may raise `CheckpointError`.

    Args:
        layers: Name -> layer.
        arg: As in `register_neuron_hooks`, like the other arguments.
        reduce: What to keep.
        position_mask: Which positions count.
        accum_dtype: Dtype of the named sums.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        arg: int | str,
        reduce: str | Reduction | None,
        position_mask: Tensor | None,
        accum_dtype: torch.dtype,
    ) -> None:
        self.position_mask = position_mask
        self._paused = False
        self._codes = ExitStack()
        self._keeps_all = reduce is None
        self._records = {name: LayerRecord(name, reduce, accum_dtype) for name in layers}
        taps = [(layer, InputTap(layer, self._records[name], arg)) for name, layer in layers.items()]
        self._handles = [layer.register_forward_pre_hook(self._pre_hook(tap), with_kwargs=True) for layer, tap in taps]

    @property
    def position_mask(self) -> Tensor | None:
        """Which positions count from the next forward on, in the shape of the input without neurons; None: all."""
        return self._position_mask

    @position_mask.setter
    def position_mask(self, mask: Tensor | None) -> None:
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            what = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise TypeError(problem(f"position_mask is {what}", "a bool tensor or None", "Use attention_mask.bool()."))
        self._position_mask = mask

    def reset(self) -> None:
        """Forget everything recorded; the hooks stay."""
        for record in self._records.values():
            record.reset()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Record no forward that runs inside the block, nor its backward."""
        paused, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = paused

    def remove(self) -> None:
        """Take the hooks off the model for good; what was recorded stays readable. A second call does nothing."""
        for record in self._records.values():
            # Removing a handle does not stop a graph built before (https://github.com/pytorch/pytorch/issues/25723).
            record.closed = True
        for handle in self._handles:
            handle.remove()
        self._codes.close()

    def all_reduce_(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up what all processes recorded, in place; call it once, after the last backward.

        Without a process group one process already has the sum, so nothing happens.

        Args:
            group: The process group; None: the default one.

        Raises:
            NeuronHookError: On every process, if a layer recorded nothing on one of them.
            ValueError: If `reduce` is None, because positions of several processes do not add up.
        """
        if self._keeps_all:
            wrong = "The hooks keep every position (reduce=None)"
            raise ValueError(problem(wrong, "a reduction that adds up", "Gather the tensors yourself."))
        if not (dist.is_available() and dist.is_initialized()):
            return
        totals = {name: record.total for name, record in self._records.items()}
        # Agree first: a process that raised alone would leave the others waiting for it.
        everyone: list[list[bool]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(everyone, [total is not None for total in totals.values()], group)
        missing = [name for name, has in zip(totals, zip(*everyone, strict=True), strict=True) if not all(has)]
        if missing:
            raise NeuronHookError(
                problem(f"Some process recorded nothing for layer {missing[0]!r}", "a record on each")
            )
        for record in self._records.values():
            # A copy, because values that were read do not change.
            record.total = record.read().clone()
            dist.all_reduce(record.total, dist.ReduceOp.SUM, group)

    def __enter__(self) -> NeuronHooks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __getitem__(self, layer: str) -> Tensor:
        if layer not in self._records:
            raise KeyError(problem(f"Layer {layer!r} has no hook", f"one of {list(self._records)}"))
        return self._records[layer].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, layer: object) -> bool:
        return layer in self._records

    def __repr__(self) -> str:
        return f"NeuronHooks({list(self._records)})"

    def _pre_hook(self, tap: InputTap) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Arguments | None]:
        # A closure, not a method: a copy of the model then shares the record, and with it the flag that silences it.
        def pre_hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            if torch.compiler.is_compiling() or tap.record.closed or self._paused:
                return None
            if not torch.is_grad_enabled():
                tap.record.num_calls_without_grad += 1
                return None
            return tap(args, kwargs, self._position_mask)

        return pre_hook


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
