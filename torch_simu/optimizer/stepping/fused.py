"""Fused: clipped steps by one kernel a weight, which gathers, advances and scatters in one pass."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_simu._checks import problem
from torch_simu.optimizer.entries import Entry, local
from torch_simu.optimizer.groups import WHITENED
from torch_simu.optimizer.storage import write

_UNFUSED = ("foreach", "maximize", "master_weights", "stochastic_rounding")
"""Options that the kernel does not know."""

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
_STATES = ("float32", "bfloat16")
_BLOCK = 1024
_ADVICE = "Use fused=False for this group."


def check_fused(group: Mapping[str, Any]) -> None:
    """Raise when a group asks for the kernel, and for what the kernel does not do.

    Raises:
        ValueError: If it does.
        ImportError: If triton is not installed.
    """
    if not group["fused"]:
        return
    if group["curvature"] in WHITENED:
        wrong = f"fused is True with curvature {group['curvature']!r}"
        raise ValueError(problem(wrong, 'a diagonal one: "gnb", "hutchinson" or "squared_gradient"', _ADVICE))
    for option in _UNFUSED:
        if group[option]:
            raise ValueError(problem(f"fused is True with {option}={group[option]!r}", f"{option}=False", _ADVICE))
    if group["state_dtype"] not in _STATES:
        wrong = f"fused is True with state_dtype torch.{group['state_dtype']}"
        raise ValueError(problem(wrong, "torch.float32 or torch.bfloat16", _ADVICE))
    for number, (param, neurons) in enumerate(zip(group["params"], group["neurons"], strict=True)):
        param = param[1] if isinstance(param, tuple) else param
        # What is no tensor at all, the base class refuses with its own message.
        if isinstance(param, Tensor) and (neurons is None or len(neurons)):
            _check_param(number, param, group["neuron_dim"], whole=neurons is None)
    _kernel()


def fuse_entries(
    group: Mapping[str, Any], entries: Sequence[Entry], states: Sequence[dict[str, Any]], finite: Tensor | bool
) -> None:
    """Make one step of a group.

    Args:
        group: Its options.
        entries: Of its parameters that have a gradient.
        states: Aligned with `entries`.
        finite: True, or a scalar on the device; where that is false nothing changes.

    Raises:
        ValueError: If the state is of another kind of step.
    """
    if any("master" in state for state in states):
        raise ValueError(problem("fused is True and the state holds master weights", "none", _ADVICE))
    for entry, state in zip(entries, states, strict=True):
        device = entry.grad.device
        _step(group, entry, state, finite.to(device) if isinstance(finite, Tensor) else True)


def _step(group: Mapping[str, Any], entry: Entry, state: dict[str, Any], finite: Tensor | bool) -> None:
    if not entry.grad.numel():
        state["step"] += finite if isinstance(finite, Tensor) else 1
        return
    weight, lr, decay = local(entry.param), group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        # A rate on the host is a number: reading it waits for nothing.
        lr = lr.reshape(()).to(weight.device) if lr.device.type != "cpu" or weight.device.type == "cpu" else lr.item()
    matrix, compact = _as_matrix(weight), _as_matrix(entry.grad).contiguous()
    kept = {key: local(state[key]) for key in ("exp_avg", "hessian")}
    work = {key: value.contiguous() for key, value in kept.items()}
    num_rows, num_columns = compact.shape
    block_columns = min(128, 1 << (num_columns - 1).bit_length())
    block_rows = _BLOCK // block_columns
    dim = group["neuron_dim"]
    # Kernels are started on the current device, wherever their tensors are.
    with torch.cuda.device_of(weight):
        _kernel()[(-(-num_rows // block_rows) * -(-num_columns // block_columns),)](
            matrix.detach(),
            compact,
            work["exp_avg"],
            work["hessian"],
            state["step"],
            entry.columns.indices,
            finite.view(torch.uint8) if isinstance(finite, Tensor) else None,
            lr,
            1.0 if isinstance(lr, Tensor) else 1 - lr * decay,
            float(decay),
            float(1 - group["betas"][0]),
            float(group["rho"]),
            float(group["eps"]),
            float(group["clip"]),
            num_rows,
            num_columns,
            *matrix.stride(),
            SELECTS_ROWS=weight.dim() == 2 and dim in (0, -2),
            DECAYS=decay != 0,
            LR_IS_POINTER=isinstance(lr, Tensor),
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            # As separate operations round.
            enable_fp_fusion=False,
        )
    if work["exp_avg"] is not kept["exp_avg"]:
        write(state, "exp_avg", work["exp_avg"])
    # What autograd counts for every operation of its own.
    torch.autograd.graph.increment_version([weight, work["exp_avg"], state["step"]])


def _as_matrix(tensor: Tensor) -> Tensor:
    """Return a view with two dimensions; only a whole tensor has more."""
    return tensor if tensor.dim() == 2 else tensor.reshape(1, -1)


def _check_param(number: int, param: Tensor, dim: Any, *, whole: bool) -> None:
    """Raise when the kernel cannot step a parameter."""
    wrong = f"fused is True and parameter {number}"
    weight = local(param)
    if weight.dtype not in _WEIGHTS:
        raise ValueError(problem(f"{wrong} is of {weight.dtype}", "float32, bfloat16 or float16", _ADVICE))
    if not whole and (weight.dim() > 2 or not isinstance(dim, int)):
        wrong += f" of shape {tuple(weight.shape)} has neurons along {dim}"
        raise ValueError(problem(wrong, "those of a matrix along one dimension", _ADVICE))
    if weight.dim() != 2 and not weight.is_contiguous():
        raise ValueError(problem(f"{wrong} of {weight.dim()} dimensions is not contiguous", "one that is", _ADVICE))
    if not weight.is_cuda and not (weight.device.type == "cpu" and _is_interpreted()):
        raise ValueError(problem(f"{wrong} is on {weight.device}", "a CUDA device", "Move it first, or fused=False."))


def _is_interpreted() -> bool:
    """Say whether Triton interprets kernels, on the processor, instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernel() -> Any:
    """Return what launches the kernel.

    Raises:
        ImportError: If triton is not installed.
    """
    try:
        import triton
    except ImportError as error:
        advice = 'Run: pip install "triton>=3". Or fused=False.'
        raise ImportError(problem(f"fused is True and triton is missing ({error})", "it installed", advice)) from error
    from torch_simu.optimizer.stepping.kernel import advance

    return triton.jit(advance)
