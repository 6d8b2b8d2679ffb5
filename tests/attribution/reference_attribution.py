"""The naive oracle of attribution: one forward and backward pass per prefix and path point, in plain loops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tests.devices.placing import here
from tests.models import VOCABULARY, tiny
from tests.strategies import generator
from torch_simu.attribution import attribute_neurons

loosely = partial(attribute_neurons, rule="midpoint", steps=10, max_completeness_error=None)
"""Attribution by a few path points in equal parts, where what those miss is not the question."""


_TWO, _THREE = 0.5 / 3**0.5, 0.5 * 0.6**0.5
GAUSS = {
    1: [(0.5, 1.0)],
    2: [(0.5 - _TWO, 0.5), (0.5 + _TWO, 0.5)],
    3: [(0.5 - _THREE, 5 / 18), (0.5, 4 / 9), (0.5 + _THREE, 5 / 18)],
}
"""Number of points -> points on [0, 1] and their weights, in closed form."""


@dataclass(frozen=True)
class Expected:
    """Scores of one layer, and the change of the objective from zero to clean activation."""

    scores: Tensor
    change: float


def lively(name: str, **config: object) -> nn.Module:
    """A tiny model whose weights are large enough for attention and nonlinearities to matter."""
    return _lively(here(), name, **config)


@functools.cache
def _lively(device: torch.device, name: str, **config: object) -> nn.Module:
    # Tuples can be cached by, lists are what configurations take.
    model = tiny(name, **{key: list(value) if isinstance(value, tuple) else value for key, value in config.items()})
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.mul_(6.0)
    return model


def sequences(seed: int, num_rows: int = 3, shortest: int = 3, longest: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of each row, about half of the labels scored, the last one always."""
    source = generator(seed)
    rows = []
    for _ in range(num_rows):
        length = int(torch.randint(shortest, longest + 1, (), generator=source))
        ids = torch.randint(3, VOCABULARY, (length,), generator=source)
        # Labels need not be the tokens themselves.
        labels = torch.randint(3, VOCABULARY, (length,), generator=source)
        labels[torch.rand(length, generator=source) < 0.5] = -100
        labels[-1] = ids[-1]
        rows.append((ids, labels))
    return rows


def padded_batch(rows: list[tuple[Tensor, Tensor]], side: str) -> dict[str, Tensor]:
    """The rows as one batch, padded to the longest and two more."""
    length = max(len(ids) for ids, _ in rows) + 2
    batch = {
        "input_ids": torch.zeros(len(rows), length, dtype=torch.int64),
        "labels": torch.full((len(rows), length), -100),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.int64),
    }
    for index, (ids, labels) in enumerate(rows):
        place = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        batch["input_ids"][index, place] = ids
        batch["labels"][index, place] = labels
        batch["attention_mask"][index, place] = 1
    return batch


def reference(
    model: nn.Module, rows: list[tuple[Tensor, Tensor]], layer: str, objective: str, rule: str, steps: int
) -> Expected:
    """The definition: each scored label is predicted from its own prefix, changed at the last position only."""
    module = model.get_submodule(layer)
    scores: Tensor | float = 0.0
    change = 0.0
    for ids, labels in rows:
        for t in range(1, len(ids)):
            if labels[t] == -100:
                continue
            beta = _last_activation(model, module, ids[:t])
            for alpha, weight in _points(rule, steps):
                activation = (alpha * beta).requires_grad_()
                value = _value(model, module, ids[:t], labels[t], activation, objective)
                (gradient,) = torch.autograd.grad(value, activation)
                scores = scores + beta.double() * gradient.double() * weight
            change += _value(model, module, ids[:t], labels[t], beta, objective).item()
            change -= _value(model, module, ids[:t], labels[t], torch.zeros_like(beta), objective).item()
    assert isinstance(scores, Tensor)
    return Expected(scores, change)


def _points(rule: str, steps: int) -> list[tuple[float, float]]:
    """Path points and their weights, which add up to 1."""
    if rule == "gauss":
        return GAUSS[steps]
    shift = {"midpoint": 0.5, "right": 0.0, "left": 1.0}[rule]
    return [((j - shift) / steps, 1 / steps) for j in range(1, steps + 1)]


def _last_activation(model: nn.Module, module: nn.Module, prefix: Tensor) -> Tensor:
    found: list[Tensor] = []
    with _replaced(module, len(prefix), lambda last: found.append(last.detach()) or last):
        model(input_ids=prefix[None], use_cache=False)
    return found[0]


def _value(
    model: nn.Module, module: nn.Module, prefix: Tensor, target: Tensor, activation: Tensor, objective: str
) -> Tensor:
    with _replaced(module, len(prefix), lambda _: activation):
        logits = model(input_ids=prefix[None], use_cache=False).logits[0, -1]
    logprob = logits.float().log_softmax(-1)[target]
    return {"logprob": logprob, "prob": logprob.exp(), "loss": -logprob}[objective]


@contextmanager
def _replaced(module: nn.Module, length: int, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the neurons of a layer at the last position, in a pass over one prefix."""

    def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        tokens = args[0].detach().reshape(length, -1)
        return (torch.cat([tokens[:-1], replace(tokens[-1])[None]]).reshape(args[0].shape),)

    if hasattr(module, "gate_up_proj"):
        module.forward = partial(_experts_forward, module, replace)
        try:
            yield
        finally:
            del module.forward
    else:
        handle = module.register_forward_pre_hook(hook)
        yield
        handle.remove()


def _experts_forward(
    experts: nn.Module, replace: Callable[[Tensor], Tensor], hidden: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """What fused experts compute, expert by expert, with the neurons of all experts at the last position replaced."""

    def linear(name: str, expert: int, value: Tensor) -> Tensor:
        matrix = getattr(experts, name)[expert]
        bias = getattr(experts, f"{name}_bias")[expert] if hasattr(experts, f"{name}_bias") else 0
        return value @ (matrix if experts.is_transposed else matrix.T) + bias

    everyone = range(len(experts.down_proj))
    neurons = torch.stack([experts._apply_gate(linear("gate_up_proj", expert, hidden)) for expert in everyone], dim=1)
    # Experts that are not chosen have no neurons: zero activations, whose weight is zero, too.
    share = torch.zeros(len(hidden), len(everyone), dtype=weights.dtype).scatter(1, chosen, weights)
    neurons = neurons * (share > 0)[..., None]
    last = replace(neurons[-1].flatten()).reshape(neurons[-1].shape)
    neurons = torch.cat([neurons[:-1].detach(), last[None]])
    outputs = torch.stack([linear("down_proj", expert, neurons[:, expert]) for expert in everyone], dim=1)
    return (share[..., None] * outputs).sum(1)
