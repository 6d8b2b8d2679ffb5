"""Loading: what a saved state must have in common with an optimizer, and how its tensors come back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_simu._checks import problem
from torch_simu.columns import NeuronDim, compact_shape, num_columns
from torch_simu.layers.dtensors import is_dtensor
from torch_simu.optimizer.counters import plain_counters
from torch_simu.optimizer.entries import compact_placements, local
from torch_simu.optimizer.groups import selects_rows
from torch_simu.optimizer.stepping.fused import check_fused
from torch_simu.optimizer.stepping.state import step_device
from torch_simu.optimizer.storage import SHAPED, WHOLE

Groups = Sequence[Mapping[str, Any]]
_ADVICE = "Make the optimizer with the selection that the state was saved for."


def aligned_params(
    state_dict: Mapping[str, Any], groups: Groups
) -> Iterator[tuple[int, Mapping[str, Any], Tensor, list[int] | None]]:
    """Yield (saved id, group, parameter, its neurons) of every parameter, in order."""
    for saved, group in zip(state_dict["param_groups"], groups, strict=False):
        for saved_id, param, neurons in zip(saved["params"], group["params"], group["neurons"], strict=False):
            yield saved_id, group, param, neurons


def check_loadable(state_dict: Mapping[str, Any], groups: Groups) -> None:
    """Raise when a state was saved for another selection or for other shapes.

    Raises:
        ValueError: If it was.
    """
    if missing := {"state", "param_groups"} - set(state_dict):
        raise ValueError(problem(f"The state has no {sorted(missing)}", "what state_dict() returned"))
    for number, (saved, group) in enumerate(zip(state_dict["param_groups"], groups, strict=False)):
        for key in ("neurons", "neuron_dim"):
            if saved.get(key) != group[key]:
                wrong = f"Group {number} of the saved state has other {key} than this optimizer"
                raise ValueError(problem(wrong, "the same selection", _ADVICE))
        if selects_rows(saved) != selects_rows(group):
            wrong = f"Group {number} of the saved state selects {'rows' if selects_rows(saved) else 'columns'}"
            raise ValueError(problem(wrong, "rows" if selects_rows(group) else "columns", _ADVICE))
        # The options of the saved state will be the group's.
        check_fused({**group, **saved, "params": group["params"]})
    for saved_id, group, param, neurons in aligned_params(state_dict, groups):
        count = None if neurons is None else len(neurons)
        shape = tuple(compact_shape(param.shape, group["neuron_dim"], count))
        for key in SHAPED:
            value = state_dict["state"].get(saved_id, {}).get(key)
            if value is not None and tuple(value.shape) != shape:
                wrong = f"The saved {key} of parameter {saved_id} has shape {tuple(value.shape)}"
                raise ValueError(problem(wrong, f"{shape}", _ADVICE))
        factor = state_dict["state"].get(saved_id, {}).get("neuron_factor")
        # What has one is a matrix; a scalar has no dimension to count.
        size = num_columns(param.shape, group["neuron_dim"]) if count is None and factor is not None else count
        if factor is not None and tuple(factor.shape) != (size, size):
            wrong = f"The saved neuron_factor of parameter {saved_id} has shape {tuple(factor.shape)}"
            raise ValueError(problem(wrong, f"{(size, size)}", _ADVICE))


def arranged(groups: list[dict[str, Any]], saved: Groups) -> list[dict[str, Any]]:
    """Return named parameters in the groups of a saved state, where each selects the same neurons; others as they are.

    Another selection may have moved layers from group to group. Their places count: draws of rounding go by them.
    """
    names, own = ([name for group in each for name in group.get("param_names", ())] for each in (saved, groups))
    num_params = sum(len(group["params"]) for group in groups)
    if len(set(own)) < num_params or sorted(names) != sorted(own):
        return groups
    held = {
        name: (param, neurons, group["neuron_dim"], selects_rows(group))
        for group in groups
        for name, param, neurons in zip(group["param_names"], group["params"], group["neurons"], strict=True)
    }
    result = []
    for number, each in enumerate(saved):
        members = [held[name] for name in each["param_names"]]
        # A parameter of which nothing trains may be in any group.
        place = each["neuron_dim"], selects_rows(each)
        if any(neurons != [] and tuple(own_place) != place for _, neurons, *own_place in members):
            return groups
        own_part = {"params": [member[0] for member in members], "neurons": [member[1] for member in members]}
        named = {"param_names": list(each["param_names"]), "neuron_dim": place[0]}
        options = {key: value for key, value in groups[min(number, len(groups) - 1)].items() if key != "rows"}
        result.append({**options, **own_part, **named, **({"rows": True} if place[1] else {})})
    return result


@contextmanager
def saving(optimizer: Optimizer) -> Iterator[None]:
    """Let states that are saved hold plain counters, before the post-hooks of others see them."""

    def plain(_: Optimizer, saved: dict[str, Any]) -> None:
        plain_counters(saved["param_groups"])

    hook = optimizer.register_state_dict_post_hook(plain, prepend=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def loading(optimizer: Optimizer) -> Iterator[None]:
    """Let a state that is loaded be checked after the pre-hooks of others, and restored before their post-hooks."""
    found: dict[str, Any] = {}

    def check(_: Optimizer, adapted: dict[str, Any]) -> None:
        groups = arranged(optimizer.param_groups, adapted.get("param_groups", []))
        check_loadable(adapted, groups)
        optimizer.param_groups[:] = groups
        found.update(adapted)

    def restore(_: Optimizer) -> None:
        restore_state(optimizer.state, found, optimizer.param_groups)

    hooks = (
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def restore_state(state: Mapping[Tensor, dict[str, Any]], state_dict: Mapping[str, Any], groups: Groups) -> None:
    """Put saved tensors in place of what the base class made of them.

    It casts state to the parameter's dtype (pytorch issue 43706), which would round the curvature.
    """
    for saved_id, group, param, neurons in aligned_params(state_dict, groups):
        for key, value in state_dict["state"].get(saved_id, {}).items():
            if key == "step":
                device = step_device(group, local(param).device)
                state[param][key] = torch.as_tensor(value).detach().to(device, torch.float32, copy=True)
            elif key in WHOLE:
                whole = value.full_tensor() if is_dtensor(value) else value
                state[param][key] = whole.detach().to(local(param).device, copy=True)
            elif isinstance(value, Tensor):
                state[param][key] = restored(value, param, neurons, group["neuron_dim"])


def restored(value: Tensor, param: Tensor, neurons: Sequence[int] | None, dim: NeuronDim) -> Tensor:
    """Return a copy of a saved tensor in its own dtype, on the parameter's device and spread as its state is."""
    value = value.detach()
    if is_dtensor(param) and not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        # A whole tensor, the same in every process: each takes its own shard of it.
        placements = compact_placements(param, dim, whole=neurons is None)
        return distribute_tensor(value.to(param.device), param.device_mesh, placements, src_data_rank=None)
    return value.to(param.device, copy=True)
