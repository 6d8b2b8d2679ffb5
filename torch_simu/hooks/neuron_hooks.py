"""NeuronHooks: what hooks captured, layer by layer, and how they are paused and taken off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType, TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.hooks.record import LayerRecord, NeuronHookError, Reduction
from torch_simu.hooks.tap import Arguments, InputTap, OutputTap


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
        neurons: Layer -> the neurons that its covariance is of; all of them where there is none.
        outputs: Whether the gradients of what layers return are summed up, too; a mapping says of which outputs.
        recording: Whether they record at once.

    Attributes:
        layers: Name -> layer.
        outputs: Name -> covariance of the gradients of its outputs, where it was asked for.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        arg: int | str,
        reduce: str | Reduction | None,
        position_mask: Tensor | None,
        accum_dtype: torch.dtype,
        neurons: Mapping[str, Tensor] = MappingProxyType({}),
        *,
        outputs: bool | Mapping[str, Tensor] = False,
        recording: bool = True,
    ) -> None:
        self.layers = MappingProxyType(dict(layers))
        self.position_mask = position_mask
        self._paused = not recording
        self._codes = ExitStack()
        self._reduce = reduce
        self._records = {name: LayerRecord(name, reduce, accum_dtype, neurons.get(name)) for name in layers}
        some = {} if isinstance(outputs, bool) else outputs
        kept = layers if outputs is not False else ()
        self._outputs = {name: LayerRecord(name, reduce, accum_dtype, some.get(name)) for name in kept}
        taps = [(layer, InputTap(layer, self._records[name], arg)) for name, layer in layers.items()]
        self._handles = [layer.register_forward_pre_hook(self._pre_hook(tap), with_kwargs=True) for layer, tap in taps]
        for name, record in self._outputs.items():
            tap = OutputTap(layers[name], record)
            self._handles.append(layers[name].register_forward_hook(self._hook(tap)))

    @property
    def reduce(self) -> str | Reduction | None:
        """What is kept, as it was asked for."""
        return self._reduce

    @property
    def outputs(self) -> Mapping[str, Tensor]:
        """Layer -> sum of the products of the gradients of its outputs, or of some of them.

        Shape: `(d_model, d_model)`, or as many as were asked for.
        """
        found = {name: record.total for name, record in self._outputs.items()}
        return MappingProxyType({name: total for name, total in found.items() if total is not None})

    @property
    def keeps_outputs(self) -> bool:
        """Whether the gradients of what layers return are summed up, too."""
        return bool(self._outputs)

    def recorded(self, layer: str) -> bool:
        """Say whether a layer recorded anything."""
        record = self._records[layer]
        return record.total is not None or bool(record.kept)

    def neurons(self, layer: str, *, outputs: bool = False) -> Tensor | None:
        """Return of which neurons a covariance is, in order; None: of all. Shape: `(num_selected,)`.

        Args:
            layer: Name of the layer.
            outputs: Whether the covariance of its outputs is meant.
        """
        return (self._outputs if outputs else self._records)[layer].neurons

    def places(self, layer: str, neurons: Tensor, *, outputs: bool = False) -> Tensor | None:
        """Return where some neurons are among those that a covariance is of; None: they are not all there.

        Waits for the device only when it is asked of other neurons than the last time.

        Args:
            layer: Name of the layer.
            neurons: In any order. Shape: `(num,)`.
            outputs: Whether the covariance of its outputs is meant.
        """
        return (self._outputs if outputs else self._records)[layer].places(neurons)

    def num_positions(self, layer: str) -> Tensor:
        """Return over how many positions the covariance of a layer is, as a scalar on the device. Shape: `()`.

        Raises:
            NeuronHookError: If the layer recorded nothing.
            ValueError: If `reduce` is another one.
        """
        if self._reduce != "covariance":
            raise ValueError(problem(f"Positions are not counted for reduce={self._reduce!r}", 'reduce="covariance"'))
        self[layer]
        return cast("Tensor", self._records[layer].num_positions)

    @property
    def position_mask(self) -> Tensor | None:
        """Which positions count from the next forward on; None: all.

        Shape: that of the input without its neurons.

        Raises:
            TypeError: If it is set to something else than a bool tensor or None.
        """
        return self._position_mask

    @position_mask.setter
    def position_mask(self, mask: Tensor | None) -> None:
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            what = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise TypeError(problem(f"position_mask is {what}", "a bool tensor or None", "Use attention_mask.bool()."))
        self._position_mask = mask

    def reset(self, *layers: str) -> None:
        """Forget everything recorded, or what was recorded of some layers; the hooks stay.

        Raises:
            KeyError: If a layer has no hook.
        """
        for name in layers:
            self._record(name)
        for records in (self._records, self._outputs):
            for name in layers or records:
                if name in records:
                    records[name].reset()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Record no forward that runs inside the block, nor its backward."""
        paused, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = paused

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside the block, where the hooks were registered with `recording=False` or are paused."""
        paused, self._paused = self._paused, False
        try:
            yield
        finally:
            self._paused = paused

    def remove(self) -> None:
        """Take the hooks off the model for good; what was recorded stays readable. A second call does nothing."""
        for record in self._all():
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
        if self._reduce is None:
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
        for record in self._all():
            # A copy, because values that were read do not change.
            record.total = record.read().clone()
            dist.all_reduce(record.total, dist.ReduceOp.SUM, group)
            if record.num_positions is not None:
                record.num_positions = record.num_positions.clone()
                dist.all_reduce(record.num_positions, dist.ReduceOp.SUM, group)

    def __enter__(self) -> NeuronHooks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __getitem__(self, layer: str) -> Tensor:
        return self._record(layer).read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, layer: object) -> bool:
        return layer in self._records

    def __repr__(self) -> str:
        return f"NeuronHooks({list(self._records)})"

    def _record(self, layer: str) -> LayerRecord:
        if layer not in self._records:
            raise KeyError(problem(f"Layer {layer!r} has no hook", f"one of {list(self._records)}"))
        return self._records[layer]

    def _all(self) -> list[LayerRecord]:
        return [*self._records.values(), *self._outputs.values()]

    def _hook(self, tap: OutputTap) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
            if not (torch.compiler.is_compiling() or tap.record.closed or self._paused) and torch.is_grad_enabled():
                tap(output, self._position_mask)

        return hook

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
