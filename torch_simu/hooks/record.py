"""LayerRecord: what the hook of one layer recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from torch_simu._checks import problem

Reduction = Callable[[Tensor, Tensor], Tensor]
"""(activation, gradient), each `(num_positions, num_neurons)` -> what to keep of one call, summed over calls."""

SUMS: Mapping[str, Reduction] = MappingProxyType(
    {
        "attribution": lambda activation, gradient: (activation * gradient).sum(0),
        "act": lambda activation, gradient: activation.sum(0),
        "grad": lambda activation, gradient: gradient.sum(0),
        "sq": lambda activation, gradient: (activation * gradient).square().sum(0),
        "covariance": lambda activation, gradient: _products(activation, gradient),
    }
)


def _reached(gradient: Tensor) -> Tensor:
    """Say which positions a backward reached. Shape: `(num_positions, 1)`."""
    return gradient.ne(0).any(-1, keepdim=True)


def _products(activation: Tensor, gradient: Tensor) -> Tensor:
    # By torch.where, because picking positions out would wait for a GPU.
    kept = torch.where(_reached(gradient), activation, 0)
    return kept.T @ kept


def _holds(own: Tensor, places: Tensor, neurons: Tensor) -> bool:
    """Say whether `own` has these neurons at these places."""
    return len(own) > 0 and torch.equal(own.index_select(0, places.clamp(max=len(own) - 1)), neurons)


class NeuronHookError(RuntimeError):
    """A hooked layer has nothing to give: not called, not reached by a backward, or called in a way that fails."""


class LayerRecord:
    """What one hooked layer recorded, and how it was called.

    Args:
        layer: Name of the layer.
        reduce: A key of `SUMS`, a reduction, or None to keep every position.
        accum_dtype: Dtype of the named sums.
        neurons: Which neurons the covariance is of, in order; None: all. Shape: `(num_selected,)`.
    """

    __slots__ = (
        "accum_dtype",
        "closed",
        "kept",
        "layer",
        "matched",
        "neurons",
        "num_calls",
        "num_calls_without_grad",
        "num_positions",
        "reduce",
        "total",
    )

    def __init__(
        self, layer: str, reduce: str | Reduction | None, accum_dtype: torch.dtype, neurons: Tensor | None = None
    ) -> None:
        self.layer, self.reduce, self.accum_dtype, self.neurons = layer, reduce, accum_dtype, neurons
        # The neurons that were looked for last, and where they are.
        self.matched: tuple[Tensor, int, Tensor | None] | None = None
        self.closed = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.num_calls = self.num_calls_without_grad = 0
        self.total: Tensor | None = None
        # Positions behind a covariance, counted where it is.
        self.num_positions: Tensor | None = None
        self.kept: list[tuple[int, Tensor]] = []

    def places(self, neurons: Tensor) -> Tensor | None:
        """Return where some neurons are among those of the covariance; None: they are not all there."""
        if self.neurons is None:
            return neurons
        # Looking at them waits for a GPU, so the same tensor is looked at once: it is kept, so that no other one takes
        # its place in memory, and its version tells when it was changed.
        if self.matched is None or self.matched[0] is not neurons or self.matched[1] != neurons._version:
            own = self.neurons.to(neurons.device)
            found = torch.searchsorted(own, neurons)
            fits = not len(neurons) or _holds(own, found, neurons)
            self.matched = neurons, neurons._version, found if fits else None
        return self.matched[2]

    def add(self, number: int, activation: Tensor, gradient: Tensor) -> None:
        """Take in what one backward through the layer's `number`-th call found.

        Raises:
            NeuronHookError: If the call has another number of neurons than before, or a callable `reduce` returns no
                tensor, or another shape than before.
        """
        if self.reduce is None:
            pair = torch.stack((activation, gradient))
            if self.kept and pair.shape[-1] != (before := self.kept[0][1].shape[-1]):
                wrong = f"A call of layer {self.layer!r} has {pair.shape[-1]} neurons"
                raise NeuronHookError(problem(wrong, f"{before} as before", "Hook a layer whose input has one width."))
            self.kept.append((number, pair))
            return
        if self.reduce == "covariance":
            count = _reached(gradient).sum()
            self.num_positions = count if self.num_positions is None else self.num_positions + count
            if self.neurons is not None:
                self.neurons = self.neurons.to(activation.device)
                activation = activation.index_select(-1, self.neurons)
        if isinstance(self.reduce, str):
            value = SUMS[self.reduce](activation.to(self.accum_dtype), gradient.to(self.accum_dtype))
        else:
            value = self.reduce(activation, gradient)
        if not isinstance(value, Tensor) or (self.total is not None and value.shape != self.total.shape):
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            expected = "a tensor" if self.total is None else f"shape {tuple(self.total.shape)} as before"
            raise NeuronHookError(problem(f"reduce returned {what} for layer {self.layer!r}", expected))
        self.total = value if self.total is None else self.total + value

    def read(self) -> Tensor:
        """Return the sum, or every position in the order of the calls.

        Raises:
            NeuronHookError: If there is nothing, or no values in it; the message names the likely causes.
        """
        found = self.total
        if self.kept:
            # A backward meets the calls in reverse; positions are wanted in the order of the forward.
            self.kept.sort(key=lambda pair: pair[0])
            found = torch.cat([pair for _, pair in self.kept], dim=1)
        if found is not None:
            if found.is_meta:
                wrong = f"What was recorded for layer {self.layer!r} is on the meta device"
                raise NeuronHookError(problem(wrong, "values", "Load the model, and give it inputs with data."))
            return found
        if self.num_calls:
            wrong = f"Layer {self.layer!r} was called {self.num_calls} times, but no backward reached it"
            advice = "Call backward on what depends on it, and before the hooks are removed."
        elif self.num_calls_without_grad:
            wrong = f"Layer {self.layer!r} was called {self.num_calls_without_grad} times, but without gradients"
            advice = "Leave torch.no_grad() and torch.inference_mode()."
        else:
            wrong = f"Layer {self.layer!r} was never called"
            advice = (
                "Likely causes: torch.compile, whose code runs no hooks; a direct call of .forward(); "
                "code that uses the weight and not the layer; hooks that are paused or removed."
            )
        raise NeuronHookError(problem(wrong, "a forward and a backward with the hooks in place", advice))
