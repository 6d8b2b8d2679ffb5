"""The optimizer's parameter groups: which entries of which parameters train, and with which options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_simu._checks import check_choice, check_count, check_number, problem
from torch_simu.columns import NeuronDim, num_columns
from torch_simu.neurons import NeuronSelection, checked_indices
from torch_simu.optimizer.storage import check_blockwise

WHITENED = ("neurons", "both")
"""The curvatures that are covariances from hooks: of the neurons, and of the outputs of their layers beside them."""

DUE = ("gnb", "hutchinson")
"""The diagonal curvatures that a loop must refresh."""

_STATE_DTYPES = ("float32", "float64", "bfloat16", "uint8")
"""Names of dtypes of the state; groups hold the name, which every format of checkpoints knows."""


def dtype_name(dtype: torch.dtype | str) -> str:
    """Return the name of a dtype: "float32" for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def selects_rows(group: Mapping[str, Any]) -> bool:
    """Say whether the neurons of a group are outputs of their layers: the rows that make them.

    A mark of the groups that have some, and no option: others are saved without it, as ever.
    """
    return bool(group.get("rows", False))


def selected_groups(params: Iterable[Any], selection: NeuronSelection | None) -> Iterable[Any]:
    """Return a group per layout in which each named parameter trains the selected neurons of its layer, or nothing.

    Without a selection they are returned as they are.
    """
    if not isinstance(params, Iterable):
        wrong = f"params is of type {type(params).__name__}"
        raise TypeError(problem(wrong, "parameters or groups of them", "Pass model.parameters()."))
    if selection is None:
        return params
    named = list(params)
    if not all(isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) for entry in named):
        raise TypeError(
            problem(
                "selection was given with unnamed params",
                "model.named_parameters()",
                "Or pass selection.param_groups(model).",
            )
        )
    names = {name for name, _ in named}
    for layer in selection:
        if f"{layer}.weight" not in names:
            raise KeyError(problem(f"Parameter {f'{layer}.weight'!r} of the selection is missing", "it among params"))
    groups: dict[int, dict[str, Any]] = {}
    for name, param in named:
        layer = name.removesuffix(".weight")
        dim, neurons = -1, []
        if layer in selection and layer != name:
            dim = _dim_by_shape(name, param, selection.num_neurons[layer])
            neurons = selection[layer].tolist()
        group = groups.setdefault(dim, {"params": [], "neurons": [], "neuron_dim": dim})
        group["params"].append((name, param))
        group["neurons"].append(neurons)
    return list(groups.values())


def _dim_by_shape(name: str, param: Tensor, size: int) -> int:
    """Return the dimension of a weight that has as many places as there are neurons: the first of a Conv1D."""
    wrong = f"Parameter {name!r} has shape {tuple(param.shape)}"
    dims = [dim for dim in (-1, 0) if param.dim() == 2 and param.shape[dim] == size]
    if not dims:
        raise ValueError(problem(wrong, f"{size} neurons", "Was the selection made on another model?"))
    if len(dims) == 2:
        advice = "Rows or columns? Pass selection.param_groups(model), which sees the layer."
        raise ValueError(problem(wrong, f"one dimension of {size} neurons", advice))
    return dims[0]


def checked_group(param_group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group as the optimizer keeps it: options checked, neurons sorted and aligned with the parameters.

    Raises:
        ValueError: If an option or index is out of bounds, or `neurons` is not aligned with `params`.
        TypeError: If an option has a wrong type.
    """
    group = dict(param_group)
    params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    # A set has no order to align with; the base class refuses it with its own message.
    group["params"] = params if isinstance(params, set) else list(params)
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
    if "state_dtype" in group:
        group["state_dtype"] = dtype_name(group["state_dtype"])
    options = {**defaults, **group}
    _check_options(options)
    if options["curvature"] in WHITENED:
        _check_whitened(tensors, options)
        # Before the first step: there is none without it.
        group.setdefault("next_refresh", 0)
    group["neurons"] = _checked_neurons(tensors, group.get("neurons"), options["neuron_dim"])
    if options["state_dtype"] == "uint8":
        check_blockwise({**group, "params": tensors})
    return group


def complete_group(group: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Add the options that a loaded group lacks, and no others: distributed checkpoints know their own keys only."""
    # The base class adds it to the defaults when something is loaded.
    group.pop("differentiable", None)
    for option, value in defaults.items():
        if option != "differentiable":
            group.setdefault(option, value)


def refreshed_by(groups: Sequence[Mapping[str, Any]], curvature: str, method: str) -> list[int]:
    """Return the numbers of the groups with a curvature.

    Raises:
        ValueError: If there is none.
    """
    numbers = [number for number, group in enumerate(groups) if group["curvature"] == curvature]
    if not numbers:
        wrong = f"{method} was called, and no group has curvature={curvature!r}"
        raise ValueError(problem(wrong, "one that has", f"Make the optimizer with curvature={curvature!r}."))
    return numbers


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise when a hyper-parameter of a group is out of bounds."""
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(problem(f"lr is a tensor of {lr.numel()} elements", "one element"))
    else:
        check_number("lr", lr)
    for number, beta in enumerate(betas):
        check_number(f"betas[{number}]", beta, high=1.0, high_open=True)
    for name in ("rho", "weight_decay"):
        check_number(name, options[name])
    for name in ("eps", "clip", "damping"):
        check_number(name, options[name], low_open=True)
    check_count("hessian_interval", options["hessian_interval"])
    check_choice("curvature", options["curvature"], (*DUE, "squared_gradient", *WHITENED))
    check_choice("state_dtype", options["state_dtype"], _STATE_DTYPES)


def _check_whitened(params: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Raise when parameters cannot be whitened."""
    advice = 'Take curvature="gnb" for that group.'
    for number, param in enumerate(params):
        if isinstance(param, Tensor) and param.dim() > 2:
            wrong = (
                f"Parameter {number} of a group with curvature {options['curvature']!r} has {param.dim()} dimensions"
            )
            raise ValueError(problem(wrong, "weights of linear layers", advice))
    if options["state_dtype"] == "uint8":
        wrong = f"state_dtype is torch.uint8 with curvature {options['curvature']!r}"
        raise ValueError(problem(wrong, "torch.float32 or torch.bfloat16", advice))


def _checked_neurons(params: list[Any], neurons: Any, dim: NeuronDim) -> list[list[int] | None]:
    """Return `neurons` aligned with `params`, each sorted, without duplicates and within bounds."""
    if neurons is None:
        neurons = [None] * len(params)
    if not isinstance(neurons, list | tuple) or len(neurons) != len(params) or any(isinstance(n, int) for n in neurons):
        wrong = f"neurons is {neurons!r}" if len(str(neurons)) < 80 else f"neurons has {len(neurons)} entries"
        raise ValueError(problem(wrong, f"a list of {len(params)} entries: None, or a list of indices per parameter"))
    checked: list[list[int] | None] = []
    for number, (param, chosen) in enumerate(zip(params, neurons, strict=True)):
        # What is no tensor at all, the base class refuses with its own message.
        if isinstance(param, Tensor) and not param.is_floating_point():
            raise ValueError(problem(f"Parameter {number} has dtype {param.dtype}", "real floating-point parameters"))
        if isinstance(param, Tensor) and param.is_meta and (chosen is None or len(chosen)):
            advice = "Load the model, or keep the layers that train on a device that is not offloaded."
            raise ValueError(problem(f"Parameter {number} is on the meta device", "data", advice))
        if chosen is None:
            checked.append(None)
            continue
        if not _are_dims(dim, param.dim()):
            expected = f"a dimension of parameter {number}, {tuple(param.shape)}, or a tuple of different ones"
            raise ValueError(problem(f"neuron_dim is {dim!r}", expected))
        name = f"params[{number}]"
        checked.append(list(checked_indices(name, chosen, max(1, num_columns(param.shape, dim)))))
    return checked


def _are_dims(dim: object, count: int) -> bool:
    dims = (dim,) if isinstance(dim, int) else dim
    if (
        not dims
        or not isinstance(dims, tuple | list)
        or not all(isinstance(each, int) and -count <= each < count for each in dims)
    ):
        return False
    return len({each % count for each in dims}) == len(dims)
