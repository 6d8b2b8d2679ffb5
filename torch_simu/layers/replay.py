"""Replay: run a model on a few tokens, call a part of it again with its first token changed, and see what moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.layers.dtensors import shard_again

NUM_TOKENS = 8
"""Tokens of the run whose calls are replayed."""

_MOVED = 1e-6
# Far enough that a nonlinearity shows, and what is linear stays so but for rounding.
_FAR = 4.0
_BENT = 1e-2


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Let a model be in eval mode inside the block, without gradients; afterwards it is as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        shard_again(model)


def drawn_tokens(model: nn.Module, num_rows: int, num_tokens: int) -> Tensor | None:
    """Return token ids that a model can be run on; None: it has no token embeddings, or they have no data.

    Shape: `(num_rows, num_tokens)`.
    """
    embeddings = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if embeddings is None or embeddings.num_embeddings < 2 or embeddings.weight.is_meta:
        return None
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, embeddings.num_embeddings, (num_rows, num_tokens), generator=draw)
    return ids.to(embeddings.weight.device)


@dataclass(slots=True, eq=False)
class Call:
    """What a part of a model was called with, and the layers inside it in the order of their calls."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layers: list[str] = field(default_factory=list)

    def replay(self, part: nn.Module, step: float = 0.0) -> tuple[object, int]:
        """Call the part again without a cache, its first token changed by a step.

        Returns:
            What the part gives, and of how many tokens.

        Raises:
            ValueError: If it was called with no hidden states.
        """
        count = 0

        def moved(value: object) -> object:
            nonlocal count
            # Masks have more dimensions, and positions come as tuples.
            if count or not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() not in (2, 3):
                return value
            # In any layout: the run has one row, and some models add tokens of their own to those that they are given.
            if (tokens := value[..., 0].numel()) < NUM_TOKENS:
                return value
            count = tokens
            return _first_moved(value, step)

        # Blocks of BERT take their cache by position.
        args = tuple(None if hasattr(value, "get_seq_length") else moved(value) for value in self.args)
        kwargs = {key: None if "past" in key or "cache" in key else moved(value) for key, value in self.kwargs.items()}
        kwargs = {key: False if key == "use_cache" else value for key, value in kwargs.items()}
        if not count:
            raise untold(part)
        return part(*args, **kwargs), count


def mixes(part: nn.Module, call: Call) -> bool:
    """Say whether later tokens of what a part gives move with the first token that it gets.

    Raises:
        ValueError: If no token moves.
    """
    clean, after = (
        _tokens(_output(output), count) for output, count in map(lambda s: call.replay(part, s), (0.0, 1.0))
    )
    first, later = _moves(clean, after)
    if not (first or later):
        raise untold(part)
    return later


def is_hidden(layer: nn.Module, part: nn.Module, call: Call, before: Sequence[nn.Module] = ()) -> bool:
    """Say whether what a layer gets is a nonlinear function of what comes before it, token by token.

    Args:
        layer: A layer inside the part.
        part: The part of the model that is called again.
        call: What it was called with.
        before: Layers inside the part whose outputs are changed; none: what the part gets is changed.

    Raises:
        ValueError: If later tokens move too.
    """
    clean, ahead, behind = (_reaching(layer, part, call, before, step) for step in (0.0, _FAR, -_FAR))
    first, later = _moves(clean, ahead)
    if later:
        raise untold(part)
    bend, change = (ahead + behind - 2 * clean)[0].abs().max(), (ahead - clean)[0].abs().max()
    return first and bool(bend > _BENT * change)


def untold(part: nn.Module) -> ValueError:
    """Return the error that a run does not tell whether a part is an MLP."""
    wrong = f"A run on a few tokens does not tell what {type(part).__name__} is"
    return ValueError(problem(wrong, "attention or an MLP", "Name the layers with a pattern."))


def _reaching(layer: nn.Module, part: nn.Module, call: Call, before: Sequence[nn.Module], step: float) -> Tensor:
    """What a layer gets, token by token."""
    found: list[Tensor] = []
    move: Callable[..., Tensor] = lambda _, __, output: _first_moved(output, step)  # noqa: E731
    with ExitStack() as stack:
        for each in before:
            stack.callback(each.register_forward_hook(move).remove)
        stack.callback(layer.register_forward_pre_hook(lambda _, args: found.append(args[0])).remove)
        _, count = call.replay(part, 0.0 if before else step)
    return _tokens(found[0], count)


def _first_moved(value: Tensor, step: float) -> Tensor:
    draw = torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(1))
    new = value.reshape(-1, value.shape[-1]).clone()
    new[0] += step * draw.to(new)
    return new.reshape(value.shape)


def _moves(clean: Tensor, after: Tensor) -> tuple[bool, bool]:
    """Whether the first token moves, and whether a later one does."""
    change = (after - clean).abs() > _MOVED * clean.abs().max()
    return bool(change[0].any()), bool(change[1:].any())


def _tokens(value: Tensor, count: int) -> Tensor:
    return value.reshape(count, -1).float()


def _output(value: object) -> Tensor:
    while not isinstance(value, Tensor):
        assert isinstance(value, tuple | list)
        value = value[0]
    return value
