"""Compare a fast method with the definition on a few samples, and choose the fastest one that is right."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from torch_simu._checks import problem
from torch_simu.attribution.methods.prefix import prefix_sums
from torch_simu.attribution.methods.sums import Method, NotApplicableError
from torch_simu.attribution.path import Path
from torch_simu.attribution.sequences import ScoredSequence

_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType({torch.float64: 1e-8, torch.float32: 1e-3})
_LOW_PRECISION_TOLERANCE = 0.1


def fastest_exact(
    model: nn.Module,
    sequences: Sequence[ScoredSequence],
    layers: Mapping[str, nn.Module],
    path: Path,
    candidates: Mapping[str, Method],
) -> str:
    """Return the name of the first candidate that agrees with "prefix" on a spot check, else "prefix".

    That a candidate does not apply to the model is no news while another one does; anything else is worth a warning.

    The check costs as much as "prefix" on four samples, two layers and two path points.

    Args:
        model: A causal language model, frozen.
        sequences: Sequences with samples.
        layers: Name -> module.
        path: Objective and path points.
        candidates: Name -> method, the fastest first.

    Warns:
        UserWarning: If no candidate agrees, or one that applies does not; the message names the model and each
            candidate's error.
    """
    few_sequences, few_layers = _few(sequences, layers)
    few_path = Path(path.objective, path.rule, 2)
    expected = {name: found.scores for name, found in prefix_sums(model, few_sequences, few_layers, few_path)}
    problems: dict[str, bool] = {}
    chosen = "prefix"
    for name, method in candidates.items():
        try:
            found = {layer: sums.scores for layer, sums in method(model, few_sequences, few_layers, few_path)}
        except NotApplicableError as error:
            problems[f"{name} does not apply ({error})"] = False
            continue
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            # Models fail in many ways on arguments that they do not foresee; the definition remains.
            problems[f"{name} fails ({error})"] = True
            continue
        worst = max(_relative_error(found[layer], expected[layer]) for layer in few_layers)
        if worst <= _tolerance(model):
            chosen = name
            break
        problems[f"{name} is off by a factor of {worst:.2g}"] = True
    if chosen == "prefix" or any(problems.values()):
        wrong = f"For {type(model).__name__}, {' and '.join(problems)}"
        text = problem(wrong, "agreement with one pass per prefix", f"Method {chosen!r} is used.")
        warnings.warn(text, UserWarning, stacklevel=4)
    return chosen


def _few(
    sequences: Sequence[ScoredSequence], layers: Mapping[str, nn.Module]
) -> tuple[list[ScoredSequence], dict[str, nn.Module]]:
    """Return two sequences with two samples each, the longest sequence among them, and the first and another layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> int:
        return int(torch.randint(size, (), generator=generator))

    chosen = [sequences[-1]] if len(sequences) == 1 else [sequences[draw(len(sequences) - 1)], sequences[-1]]
    few_sequences = []
    for sequence in chosen:
        keep = torch.tensor(sorted({draw(sequence.num_samples), sequence.num_samples - 1}))
        few_sequences.append(ScoredSequence(sequence.ids, sequence.queries[keep], sequence.targets[keep]))
    names = list(layers)
    # The first layer has all others above it, where a method can go wrong.
    kept = {names[0], names[draw(len(names))]}
    return few_sequences, {name: layers[name] for name in names if name in kept}


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    size = expected.norm().item()
    error = (found - expected).norm().item()
    # NaN compares false below, so that it never passes for agreement.
    return 0.0 if error == 0 else error / size if size else float("inf")


def _tolerance(model: nn.Module) -> float:
    dtypes = {param.dtype for param in model.parameters()}
    return max((_TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE) for dtype in dtypes), default=_TOLERANCE[torch.float32])
