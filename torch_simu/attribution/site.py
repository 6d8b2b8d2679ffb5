"""Site: where the neurons of a layer are scaled in one pass, and how a gradient there becomes scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.attribution.experts import experts_scores, with_neurons_times
from torch_simu.layers import is_fused_experts


@dataclass(slots=True, eq=False)
class Site:
    """Where the neurons of one layer are scaled in one pass, and what was found there.

    Of a linear layer that is its input. Fused experts show their neurons nowhere, but their output is linear in them:
    it is scaled instead, less what is no neuron's, and the gradient goes on to each neuron from there.

    Args:
        name: The layer's name, for messages.
        module: The layer; it must be called exactly once, with every token.
        streams: Rows that the layer should see.
        tokens: Tokens per row that the layer should see.
        alphas: Path points. Shape: `(num_alphas,)`, or with one for each first entry of the part `(num_alphas, size)`.
        pick: From a tensor `(streams, tokens, ...)` to the clean part of it that is scaled.
        place: From the scaled part, `(num_alphas, ...)`, and the whole to what the layer gets instead of the whole.
        clean: The same site in a clean pass, whose part is scaled instead of that of this pass.

    Attributes:
        leaf: The scaled part; it requires a gradient. Shape: `(num_alphas, ...)`.
    """

    name: str
    module: nn.Module
    streams: int
    tokens: int
    alphas: Sequence[float] | Tensor
    pick: Callable[[Tensor], Tensor]
    place: Callable[[Tensor, Tensor], Tensor]
    clean: Site | None = None
    leaf: Tensor | None = None
    _part: Tensor | None = None
    _inputs: tuple[Tensor, ...] = ()
    _calls: int = 0

    @contextmanager
    def scaled(self) -> Iterator[None]:
        """Scale the neurons in the forward pass inside the block.

        Raises:
            ValueError: If the layer is not called once with `streams * tokens` tokens.
        """
        if is_fused_experts(self.module):
            handle = self.module.register_forward_hook(self._scale_output)
        else:
            handle = self.module.register_forward_pre_hook(self._scale_input)
        try:
            yield
        finally:
            handle.remove()
        if self._calls == 0:
            wrong = f"Layer {self.name!r} is not used in the forward pass"
            raise ValueError(problem(wrong, "one call", "Leave it out."))

    def scores(self, gradient: Tensor) -> Tensor:
        """Return activation times gradient of each neuron, summed over path points and positions.

        Args:
            gradient: Of the objective by the leaf, or by its first path points.

        Returns:
            Shape: `(num_neurons,)`, float64 on the CPU.
        """
        source = self.clean or self
        assert source._part is not None
        if is_fused_experts(self.module):
            return experts_scores(self.module, source._inputs, gradient)
        return attributed(gradient, source._part)

    def scores_of_each(self, gradient: Tensor) -> Tensor:
        """Return activation times gradient of each neuron, for each first entry of the part by itself.

        Args:
            gradient: Of the objective by the leaf. Shape: `(1, size, ...)`.

        Returns:
            Shape: `(size, num_neurons)`, float64 on the CPU.
        """
        assert self._part is not None
        if is_fused_experts(self.module):
            every = range(len(self._part))
            rows = [([each[one : one + 1] for each in self._inputs], gradient[:, one : one + 1]) for one in every]
            return torch.stack([experts_scores(self.module, *row) for row in rows])
        wide = torch.promote_types(self._part.dtype, torch.float32)
        return (gradient[0].to(wide) * self._part.to(wide)).cpu().double()

    def _scale_input(self, _: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        found = self._checked(args[0] if args else None)
        # OPT and some mixtures of experts merge rows and tokens into one dimension.
        new = self._replaced(found.reshape(self.streams, self.tokens, -1))
        return (new.flatten(0, 1) if found.dim() == 2 else new, *args[1:])

    def _scale_output(self, module: nn.Module, args: tuple[object, ...], output: object) -> Tensor | None:
        if self._calls and self.leaf is None:
            # A call of `with_neurons_times`.
            return None
        found = self._checked(output)
        inputs = [arg for arg in args if isinstance(arg, Tensor)]
        if any(len(arg) != len(found) for arg in inputs) or not inputs:
            shapes = [tuple(arg.shape) for arg in inputs]
            wrong = f"The experts of layer {self.name!r} are called with shapes {shapes}"
            raise ValueError(problem(wrong, f"{self.streams} x {self.tokens} tokens each", "Leave the layer out."))
        rows = (
            arg.detach().reshape(self.streams, self.tokens, *arg.shape[1 if arg.dim() < 3 else 2 :]) for arg in inputs
        )
        self._inputs = tuple(self.pick(arg).flatten(0, -2) for arg in rows)
        rest = with_neurons_times(0.0, module, args)
        whole = (found - rest).reshape(self.streams, self.tokens, -1)
        new = self._replaced(whole).reshape(-1, *found.shape[1:])
        return new + rest

    def _checked(self, found: object) -> Tensor:
        self._calls += 1
        if self._calls > 1 or not isinstance(found, Tensor) or not self._holds(found):
            shape = tuple(found.shape) if isinstance(found, Tensor) else "no tensor"
            wrong = f"Call {self._calls} of layer {self.name!r} in one pass has input shape {shape}"
            advice = "Leave the layer out."
            raise ValueError(problem(wrong, f"one call with {self.streams} x {self.tokens} tokens", advice))
        return found

    def _holds(self, found: Tensor) -> bool:
        """Whether it holds the tokens of each stream; XLNet puts tokens first."""
        rows = found.dim() < 3 or len(found) == self.streams
        return rows and found[..., 0].numel() == self.streams * self.tokens

    def _replaced(self, whole: Tensor) -> Tensor:
        self._part = self.pick(whole).detach()
        source = self.clean or self
        assert source._part is not None
        self.leaf = scaled(source._part, self.alphas)
        return self.place(self.leaf, whole)


def scaled(activation: Tensor, alphas: Sequence[float] | Tensor) -> Tensor:
    """Return `alpha * activation` for each alpha as a new leaf that requires a gradient, rounded once.

    Shape: `(num_alphas,)` before those of `activation`.
    """
    wide = activation.detach().to(torch.promote_types(activation.dtype, torch.float32))
    points = torch.as_tensor(alphas, dtype=wide.dtype, device=wide.device)
    return (
        (points.reshape(*points.shape, *[1] * (wide.dim() + 1 - points.dim())) * wide)
        .to(activation.dtype)
        .requires_grad_()
    )


def attributed(gradient: Tensor, activation: Tensor) -> Tensor:
    """Return the sum over path points and positions of activation times gradient.

    Args:
        gradient: Of the objective. Shape: `(num_alphas, ..., num_neurons)`.
        activation: The clean one. Shape: `(..., num_neurons)`.

    Returns:
        Shape: `(num_neurons,)`, float64 on the CPU.
    """
    wide = torch.promote_types(activation.dtype, torch.float32)
    product = gradient.to(wide).sum(0) * activation.to(wide)
    if product.device.type == "mps":
        # That device has no float64.
        product = product.cpu()
    return product.double().flatten(0, -2).sum(0).cpu()
