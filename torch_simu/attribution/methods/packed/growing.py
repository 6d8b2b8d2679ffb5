"""Growing: one pass in which every layer begins streams of its own, at its block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.attribution.methods.cacheable import ADVICE
from torch_simu.attribution.methods.sums import NotApplicableError
from torch_simu.attribution.site import Site


def blocks_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the block that each layer is in: the outermost module around it that is an entry of a list.

    Returns:
        Layer -> its block, in the order of the layers; empty where a layer is in none.

    Examples:
        >>> model = nn.Module()
        >>> model.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
        >>> blocks = blocks_of(model, {"layers.1.0": model.layers[1][0]})
        >>> blocks["layers.1.0"] is model.layers[1]
        True
    """
    found = {}
    for name in layers:
        module = model
        for part in name.split("."):
            inside, module = isinstance(module, nn.ModuleList), module.get_submodule(part)
            if inside:
                found[name] = module
                break
    return found if len(found) == len(layers) else {}


@contextmanager
def growing(
    blocks: Mapping[str, nn.Module], layers: Mapping[str, nn.Module], tokens: int, alphas: Sequence[float]
) -> Iterator[dict[str, Site]]:
    """Let one clean stream grow inside the block: each layer scales its neurons in streams of its own, one per point.

    The streams of a layer begin as copies of the clean one where its block begins, because below they are the same. The
    first stream stays clean; then come those of the first layer, of the second, and so on.

    Args:
        blocks: Layer -> its block, in the order in which they run.
        layers: The same layers -> their modules.
        tokens: Tokens of each stream.
        alphas: Path points.
    """
    sites: dict[str, Site] = {}
    size = len(alphas)
    with ExitStack() as stack:
        for block in dict.fromkeys(blocks.values()):
            inside = [name for name, its in blocks.items() if its is block]
            first = 1 + size * len(sites)
            more = size * len(inside)
            stack.callback(block.register_forward_pre_hook(partial(_grown, first, more), with_kwargs=True).remove)
            for number, name in enumerate(inside):
                begin = first + number * size
                place = partial(_placed, slice(begin, begin + size))
                sites[name] = Site(name, layers[name], first + more, tokens, alphas, _clean, place)
                stack.enter_context(sites[name].scaled())
        yield sites


def _grown(
    streams: int, more: int, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    # Modules name the stream differently, or take it by position.
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or hidden.dim() < 3 or len(hidden) != streams:
        shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise NotApplicableError(problem(f"A block is called with {shape}", f"({streams}, tokens, width)", ADVICE))
    hidden = torch.cat([hidden, hidden[:1].expand(more, *hidden.shape[1:])])
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _clean(whole: Tensor) -> Tensor:
    return whole[0]


def _placed(which: slice, leaf: Tensor, whole: Tensor) -> Tensor:
    return torch.cat([whole[: which.start], leaf, whole[which.stop :]])
