"""Compare a fast method with the definition on a few samples, and choose the fastest one that is right."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.attribution.methods.cacheable import ADVICE
from torch_simu.attribution.methods.memory import Memory
from torch_simu.attribution.methods.prefix import prefix_sums
from torch_simu.attribution.methods.sums import Method, NotApplicableError
from torch_simu.attribution.path import Path
from torch_simu.attribution.sequences import ScoredSequence

_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType({torch.float64: 1e-8, torch.float32: 1e-3})
_LOW_PRECISION_TOLERANCE = 0.1
_TELLING = 2
# Models fail in many ways on arguments that they do not foresee; the definition remains.
_FAILURES = (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError)
_AGREEMENT = "agreement with one pass per prefix"


def fastest_exact(
    model: nn.Module,
    sequences: Sequence[ScoredSequence],
    layers: Mapping[str, nn.Module],
    path: Path,
    memory: Memory,
    candidates: Mapping[str, Method],
) -> str:
    """Return the name of the first candidate that agrees with "prefix" on a spot check, else "prefix".

    That a candidate does not apply to the model is no news while another one does; anything else is worth a warning.

    The check costs as much as "prefix" on four samples and two layers at one path point.

    Args:
        model: A causal language model, frozen.
        sequences: Sequences with samples.
        layers: Name -> module.
        path: Objective and path points.
        memory: What one pass may take.
        candidates: Name -> method, the fastest first.

    Warns:
        UserWarning: If no candidate agrees, or one that applies does not; the message names the model and each
            candidate's error.
    """
    sample = _Sample(model, sequences, layers, path, memory)
    problems: dict[str, bool] = {}
    chosen = "prefix"
    for name, method in candidates.items():
        try:
            found = sample.scores(method)
        except NotApplicableError as error:
            problems[f"{name} does not apply ({error})"] = False
            continue
        except _FAILURES as error:
            problems[f"{name} fails ({error})"] = True
            continue
        worst = sample.error(found)
        if worst <= _tolerance(model):
            chosen = name
            break
        problems[f"{name} is off by a factor of {worst:.2g}"] = True
    if chosen == "prefix" or any(problems.values()):
        wrong = f"For {type(model).__name__}, {' and '.join(problems)}"
        text = problem(wrong, _AGREEMENT, f"Method {chosen!r} is used.")
        warnings.warn(text, UserWarning, stacklevel=4)
    return chosen


def check_exact(
    model: nn.Module,
    sequences: Sequence[ScoredSequence],
    layers: Mapping[str, nn.Module],
    path: Path,
    memory: Memory,
    name: str,
    method: Method,
) -> None:
    """Raise `NotApplicableError` if a method does not agree with "prefix" on a spot check; at its cost.

    Args:
        model: A causal language model, frozen.
        sequences: Sequences with samples.
        layers: Name -> module.
        path: Objective and path points.
        memory: What one pass may take.
        name: The method's name, for the message.
        method: The method.
    """
    sample = _Sample(model, sequences, layers, path, memory)
    try:
        found = sample.scores(method)
    except NotApplicableError:
        raise
    except _FAILURES as error:
        # The exception itself may be the caller's own, from a hook.
        error.add_note(problem(f"For {type(model).__name__}, {name} fails", _AGREEMENT, ADVICE))
        raise
    worst = sample.error(found)
    # NaN compares false, so that it never passes for agreement.
    if not worst <= _tolerance(model):
        wrong = f"For {type(model).__name__}, {name} is off by a factor of {worst:.2g}"
        raise NotApplicableError(problem(wrong, _AGREEMENT, ADVICE))


class _Sample:
    """A few samples and layers, and what "prefix" finds there."""

    def __init__(
        self,
        model: nn.Module,
        sequences: Sequence[ScoredSequence],
        layers: Mapping[str, nn.Module],
        path: Path,
        memory: Memory,
    ) -> None:
        few_sequences, few_layers = _few(sequences, layers)
        self.arguments = model, few_sequences, few_layers, Path(path.objective, steps=1, measured=False), memory

    def scores(self, method: Method) -> dict[str, Tensor]:
        """Return the scores of each layer by a method."""
        return {layer: sums.scores for layer, sums in method(*self.arguments)}

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """The scores of each layer by definition; no pass is made before they are asked for."""
        return self.scores(prefix_sums)

    def error(self, found: Mapping[str, Tensor]) -> float:
        """Return the largest relative error of a layer's scores."""
        errors = [_relative_error(found[layer], scores) for layer, scores in self.expected.items()]
        return float(torch.tensor(errors).max())


def _few(
    sequences: Sequence[ScoredSequence], layers: Mapping[str, nn.Module]
) -> tuple[list[ScoredSequence], dict[str, nn.Module]]:
    """Return the samples with the shortest and the longest prefix, one more beside each, and two layers.

    Windows, and positions that are turned by the length of the pass, show where prefixes are long or differ in length.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> int:
        return int(torch.randint(size, (), generator=generator))

    longest = max(range(len(sequences)), key=lambda number: len(sequences[number]))
    earliest = min(range(len(sequences)), key=lambda number: _first_telling(sequences[number])[1])
    kept = {longest: {sequences[longest].num_samples - 1}}
    kept.setdefault(earliest, set()).add(_first_telling(sequences[earliest])[0])
    few_sequences = []
    for number in sorted(kept):
        sequence = sequences[number]
        keep = torch.tensor(sorted(kept[number] | {draw(sequence.num_samples)}))
        queries = sequence.queries[keep]
        few_sequences.append(ScoredSequence(sequence.ids[: int(queries[-1]) + 1], queries, sequence.targets[keep]))
    names = list(layers)
    # The first layer has all others above it, where a method can go wrong.
    few_layers = {names[0], names[draw(len(names))]}
    return few_sequences, {name: layers[name] for name in names if name in few_layers}


def _first_telling(sequence: ScoredSequence) -> tuple[int, int]:
    """Return the first sample whose prefix is long enough for positions to matter, and the length; else the last."""
    lengths = (sequence.queries + 1).tolist()
    found = [(number, length) for number, length in enumerate(lengths) if length >= _TELLING]
    return found[0] if found else (len(lengths) - 1, 2**62)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    size = expected.norm().item()
    error = (found - expected).norm().item()
    return 0.0 if error == 0 else error / size if size else float("inf")


def _tolerance(model: nn.Module) -> float:
    dtypes = {param.dtype for param in model.parameters()}
    return max((_TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE) for dtype in dtypes), default=_TOLERANCE[torch.float32])
