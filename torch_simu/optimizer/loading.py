"""Loading: what a saved state must have in common with an optimizer, and how its tensors come back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from torch_simu._checks import problem
from torch_simu.optimizer.entries import NeuronDim, compact_layout
from torch_simu.optimizer.storage import SHAPED

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
    for saved_id, group, param, neurons in aligned_params(state_dict, groups):
        count = None if neurons is None else len(neurons)
        shape = tuple(compact_layout(param, group["neuron_dim"], count)[0])
        for key in SHAPED:
            value = state_dict["state"].get(saved_id, {}).get(key)
            if value is not None and tuple(value.shape) != shape:
                wrong = f"The saved {key} of parameter {saved_id} has shape {tuple(value.shape)}"
                raise ValueError(problem(wrong, f"{shape}", _ADVICE))


def restored(value: Tensor, param: Tensor, neurons: Sequence[int] | None, dim: NeuronDim) -> Tensor:
    """Return a copy of a saved tensor in its own dtype, on the parameter's device and spread as its state is."""
    value = value.detach()
    if isinstance(param, DTensor) and not isinstance(value, DTensor):
        # A whole tensor, the same in every process: each takes its own shard of it.
        _, placements = compact_layout(param, dim, None if neurons is None else len(neurons))
        return distribute_tensor(value.to(param.device), param.device_mesh, placements, src_data_rank=None)
    return value.to(param.device, copy=True)
