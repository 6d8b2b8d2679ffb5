"""Find the layers with neurons by name: the user's pattern, the table of known models, the tensor-parallel plan."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from types import MappingProxyType

from torch import nn

from torch_simu._checks import check_pattern, problem
from torch_simu.layers.checks import check_kind
from torch_simu.layers.kinds import has_neurons, num_neurons
from torch_simu.layers.probe import probed_projections

Selector = str | Callable[[str, nn.Module], bool] | Iterable[str]
"""How layers are named: a regular expression for the end of the name, a predicate on (name, module), or the names."""

_LLAMA = (r"mlp\.down_proj", r"self_attn\.[qkvo]_proj")
_FALCON = (r"mlp\.dense_4h_to_h", r"(?:attention|self_attention)\.(?:query_key_value|dense)")

# Model type -> (down projections, attention projections), as regular expressions for the end of the module name.
_FAMILIES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("llama", "mistral", "olmo", "olmo2", "olmo3", "qwen2", "qwen3", "stablelm"), _LLAMA),
        **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "cohere", "cohere2"), _LLAMA),
        # Its vision tower has projections of the same names, which are no part of the language model.
        "gemma3": (
            r"language_model\.layers\.\d+\.mlp\.down_proj",
            r"language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
        ),
        "phi3": (r"mlp\.down_proj", r"self_attn\.(?:qkv|o)_proj"),
        "phi": (r"mlp\.fc2", r"self_attn\.(?:[qkv]_proj|dense)"),
        "starcoder2": (r"mlp\.c_proj", r"self_attn\.[qkvo]_proj"),
        "gpt2": (r"mlp\.c_proj", r"attn\.(?:c_attn|c_proj)"),
        **dict.fromkeys(("gpt_neox", "falcon", "bloom"), _FALCON),
        "gptj": (r"mlp\.fc_out", r"attn\.(?:[qkv]|out)_proj"),
        "gpt_neo": (r"mlp\.c_proj", r"attn\.attention\.(?:[qkv]|out)_proj"),
        "opt": (r"layers\.\d+\.fc2", r"self_attn\.(?:[qkv]|out)_proj"),
        "mpt": (r"ffn\.down_proj", r"attn\.(?:Wqkv|out_proj)"),
        **dict.fromkeys(("mixtral", "olmoe", "gpt_oss"), (r"mlp\.experts", _LLAMA[1])),
        # Some of its blocks may be dense.
        "qwen3_moe": (r"mlp\.(?:experts|down_proj)", _LLAMA[1]),
        # Its blocks without attention mix positions by a recurrence, whose projections are no attention.
        "recurrent_gemma": (r"mlp_block\.down_proj", r"temporal_block\.[qkvo]_proj"),
    }
)


def select_layers(model: nn.Module, select: Selector | None = None) -> dict[str, nn.Module]:
    """Return the layers that `select` names, in the order of `model.named_modules()`.

    Args:
        model: Any module.
        select: A regular expression that the end of the dotted name must match (`"mlp.down_proj"`), a predicate on
            (name, module), or an iterable of exact names. None: the model's MLP down projections.

    Returns:
        Name -> module, never empty.

    Raises:
        ValueError: If nothing matches, or the expression is not valid; the message lists the candidates.
        KeyError: If an exact name is not in the model.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(select_layers(model, lambda name, module: isinstance(module, nn.Linear)))
        ['0', '2']
    """
    if select is None:
        return down_projections(model)
    modules = dict(model.named_modules())
    if isinstance(select, str):
        found = {name: module for name, module in modules.items() if _ends_with(name, select)}
    elif callable(select):
        found = {name: module for name, module in modules.items() if select(name, module)}
    else:
        names = list(select)
        if unknown := [name for name in names if name not in modules]:
            raise KeyError(problem(f"Layer {unknown[0]!r} is not in the model", "a name from named_modules()"))
        found = {name: module for name, module in modules.items() if name in set(names)}
    if not found:
        wrong = f"The pattern {select!r}" if isinstance(select, str) else "The selector"
        raise ValueError(problem(f"{wrong} matches no layer", "at least one", _candidates(model)))
    return found


def down_projections(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Module]:
    """Return the MLP down projections, whose input features are the model's neurons.

    Without a pattern the layers come from a table by model type and from the model's tensor-parallel plan, which must
    agree. A model that is in neither, or in the plan alone, is run once on a few tokens to see which layers mix
    positions, and that must agree with the plan. Experts that are fused into one parameter are one layer.

    Args:
        model: A causal language model of transformers, or any module with a `pattern`.
        pattern: Regular expression for the end of the layer names, for models that are not in the table.

    Raises:
        ValueError: If the model is not known, the answers differ (the message names both), or nothing matches (the
            message lists the candidate layers).
        TypeError: If a matching layer has no neurons.
    """
    return _projections(model, pattern, 0, "MLP down projections")


def attention_projections(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Module]:
    """Return the attention projections: every linear layer inside the parts of a block by which positions attend.

    Queries, keys, values and output, fused or not, with what leads to them where they are made in two steps, and gates.
    Norms are no projections, and mixers with a convolution or a recurrence are no attention. Arguments and errors as
    `down_projections`.
    """
    return _projections(model, pattern, 1, "attention projections")


def _projections(model: nn.Module, pattern: str | None, which: int, what: str) -> dict[str, nn.Module]:
    names = _known(model, which, what) if pattern is None else _matching(model, pattern)
    # Modules that only hold the projection (an attached or wrapped layer inside) are not matched by the end of a name.
    found = {name: module for name, module in model.named_modules() if name in names}
    if not found:
        raise ValueError(problem(f"No layer matches {pattern!r} for {what}", "at least one", _candidates(model)))
    for name, module in found.items():
        check_kind(name, module)
    return found


def _known(model: nn.Module, which: int, what: str) -> set[str]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    table = _FAMILIES[model_type][which] if isinstance(model_type, str) and model_type in _FAMILIES else None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        wrong = f"{type(model).__name__} has an encoder and a decoder"
        raise ValueError(problem(wrong, "a model of one kind of blocks, or a pattern", _candidates(model)))
    answers: dict[str, set[str]] = {}
    if table is not None:
        answers["the table of known models"] = _matching(model, table)
    # The plan leaves out how queries, keys and values are cut where that is not by columns: it settles the MLPs only.
    if which == 0 and (planned := _planned(model)):
        answers["the tensor-parallel plan"] = planned
    if table is None:
        # Models fail in many ways on a call that they do not foresee, and a plan may stand alone.
        with suppress(ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError):
            answers["a run on a few tokens"] = probed_projections(model)[which]
    answers = {source: names for source, names in answers.items() if names}
    if not answers:
        wrong = f"The {what} of {type(model).__name__} (model type {model_type!r}) are not known"
        raise ValueError(problem(wrong, f"one of {', '.join(_FAMILIES)}, or a pattern", _candidates(model)))
    if table is None and len(answers) == 2 and _completes(*answers.values()):
        return answers.popitem()[1]
    (first, names), *others = answers.items()
    for other, theirs in others:
        if theirs != names:
            example = sorted(names ^ theirs)[0]
            sides = f"{first} and {other} differ on {len(names ^ theirs)} {what} of {type(model).__name__}"
            wrong = f"{sides[0].upper()}{sides[1:]}: {example!r} is in {first if example in names else other} only"
            raise ValueError(problem(wrong, "the same answer", _candidates(model)))
    return names


def _planned(model: nn.Module) -> set[str]:
    """The layers that the tensor-parallel plan cuts along their inputs ("rowwise"): those that sum over neurons."""
    plan = getattr(getattr(model, "config", None), "base_model_tp_plan", None) or {}
    keys = [key for key, style in plan.items() if "rowwise" in style and not re.search(r"attn|attention", key)]
    # A key such as layers.*.mlp.experts.down_proj names a parameter; the layer is the module that holds it.
    keys = [re.sub(r"(\bexperts)\.down_proj$", r"\1", key) for key in keys]
    pattern = "|".join(re.escape(key).replace(r"\*", r"\d+") for key in keys)
    modules = dict(model.named_modules())
    # A key with "norm" may be there for attention too, and holds no neurons.
    return {name for name in _matching(model, pattern) if has_neurons(modules[name])} if keys else set()


def _completes(planned: set[str], ran: set[str]) -> bool:
    """Say whether a run only adds to what the plan cuts, in the same parts of the blocks.

    Plans leave layers uncut: shared experts beside routed ones or the other way round, and dense blocks among sparse.
    """
    part = partial(re.sub, r"^(.*?)\.\d+\.([^.]+)\..*$", r"\1.*.\2")
    return planned <= ran and {part(name) for name in ran} == {part(name) for name in planned}


def _matching(model: nn.Module, pattern: str) -> set[str]:
    return {name for name, _ in model.named_modules() if _ends_with(name, pattern)}


def _ends_with(name: str, pattern: str) -> bool:
    return re.search(rf"(?:^|\.)(?:{check_pattern(pattern)})$", name) is not None


def _candidates(model: nn.Module) -> str:
    groups: dict[str, int] = {}
    for name, module in model.named_modules():
        if has_neurons(module):
            key = re.sub(r"\b\d+\b", "*", name) or "(the module itself)"
            groups[key] = max(groups.get(key, 0), num_neurons(module))
    listed = ", ".join(f"{name} ({size} inputs)" for name, size in list(groups.items())[:20]) or "none"
    return f"Name the layers with a pattern; candidates are: {listed}."
