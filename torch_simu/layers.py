"""Find the layers whose inputs are neurons, and say which dimension of their weight the neurons are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from torch import nn

from torch_simu._checks import problem

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
    }
)


def is_neuron_layer(module: nn.Module) -> bool:
    """Say whether the inputs of `module` are neurons: `nn.Linear`, its quantized kinds, or GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def neuron_dim(module: nn.Module) -> int:
    """Return the dimension of `module.weight` that the neurons are: -1 for linear layers, 0 for GPT-2's `Conv1D`.

    Raises:
        TypeError: If `module` is no such layer.

    Examples:
        >>> neuron_dim(nn.Linear(4, 2))
        -1
    """
    return 0 if _is_conv1d(_checked(module)) else -1


def num_neurons(module: nn.Module) -> int:
    """Return the number of input features of a linear layer, also where its weight is packed.

    Raises:
        TypeError: If `module` is no such layer.

    Examples:
        >>> num_neurons(nn.Linear(4, 2))
        4
    """
    return int(getattr(_checked(module), "nx" if _is_conv1d(module) else "in_features"))


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

    Args:
        model: A causal language model of transformers, or any module with a `pattern`.
        pattern: Regular expression for the end of the layer names, for models that are not in the table.

    Raises:
        ValueError: If the model is not known, nothing matches (the message lists the candidate layers), or the model
            has experts fused into one parameter and no `pattern` says which other layers are meant.
        TypeError: If a matching layer is neither linear nor `Conv1D`.
    """
    return _projections(model, pattern, 0, "MLP down projections")


def attention_projections(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Module]:
    """Return the attention projections (queries, keys, values, output); arguments and errors as `down_projections`."""
    return _projections(model, pattern, 1, "attention projections")


def _projections(model: nn.Module, pattern: str | None, which: int, what: str) -> dict[str, nn.Module]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if pattern is None:
        if which == 0:
            _refuse_fused_experts(model)
        pattern = _known_pattern(model, model_type, which)
    if pattern is None:
        wrong = f"The {what} of {type(model).__name__} (model type {model_type!r}) are not known"
        raise ValueError(problem(wrong, f"one of {', '.join(_FAMILIES)}, or a pattern", _candidates(model)))
    # Modules that only hold the projection (an attached or wrapped layer inside) are not matched by the end of a name.
    found = {name: module for name, module in model.named_modules() if _ends_with(name, pattern)}
    if not found:
        raise ValueError(problem(f"No layer matches {pattern!r} for {what}", "at least one", _candidates(model)))
    for name, module in found.items():
        if not is_neuron_layer(module):
            raise TypeError(problem(f"Layer {name!r} is a {type(module).__name__}", "nn.Linear or Conv1D"))
    return found


def _known_pattern(model: nn.Module, model_type: object, which: int) -> str | None:
    if isinstance(model_type, str) and model_type in _FAMILIES:
        return _FAMILIES[model_type][which]
    # The tensor-parallel plan shards the inputs of exactly the layers that sum over neurons or heads ("rowwise").
    plan = getattr(getattr(model, "config", None), "base_model_tp_plan", None) or {}
    attention = re.compile(r"attn|attention")
    keys = [
        key
        for key, style in plan.items()
        if "wise" in style and ("rowwise" in style or which == 1) and bool(attention.search(key)) == bool(which)
    ]
    # A plan key such as layers.*.mlp.experts.down_proj names a fused parameter, which is no layer.
    keys = [key for key in keys if "expert" not in key]
    return "|".join(re.escape(key).replace(r"\*", r"\d+") for key in keys) or None


def _refuse_fused_experts(model: nn.Module) -> None:
    # The dense layers beside the experts would be found alone, and that would look like the whole model.
    for name, param in model.named_parameters():
        if param.dim() == 3 and re.search(r"\bexperts\b.*\bdown_proj", name):
            wrong = f"The experts' down projections are fused into the parameter {name!r} of shape {tuple(param.shape)}"
            raise ValueError(problem(wrong, "one linear layer each", _candidates(model)))


def _ends_with(name: str, pattern: str) -> bool:
    try:
        return re.search(rf"(?:^|\.)(?:{pattern})$", name) is not None
    except re.error as error:
        raise ValueError(problem(f"The pattern {pattern!r} is invalid ({error})", "a regular expression")) from None


def _is_conv1d(module: nn.Module) -> bool:
    # By name, because transformers must not be imported for models that do not come from there.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nx") and hasattr(module, "nf")


def _checked(module: nn.Module) -> nn.Module:
    if not is_neuron_layer(module):
        raise TypeError(problem(f"The layer is a {type(module).__name__}", "nn.Linear or Conv1D"))
    return module


def _candidates(model: nn.Module) -> str:
    groups: dict[str, int] = {}
    for name, module in model.named_modules():
        if is_neuron_layer(module):
            key = re.sub(r"\b\d+\b", "*", name) or "(the module itself)"
            groups[key] = max(groups.get(key, 0), num_neurons(module))
    listed = ", ".join(f"{name} ({size} inputs)" for name, size in list(groups.items())[:20]) or "none"
    return f"Name the layers with a pattern; candidates are: {listed}."
