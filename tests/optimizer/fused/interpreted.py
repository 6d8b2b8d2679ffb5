"""Run all cases, and those that mutants must fail, where TRITON_INTERPRET is set when Triton is imported.

Prints one JSON object: what each case said, or null.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import torch

from tests.optimizer.fused.cases import a_step_that_is_not_finite_changes_nothing as guarded
from tests.optimizer.fused.cases import named
from tests.optimizer.fused.cases import steps_are_those_of_the_eager_step as eager
from torch_simu.optimizer.stepping import fused, kernel

MUTANTS = {
    "forgets to clip from below": ("tl.where(ratio < -clip, -clip, ", "tl.where(ratio < -clip, ratio, ", "plain"),
    "forgets to clip from above": ("tl.where(ratio > clip, clip, ratio)", "ratio", "plain"),
    "swaps the share of the momentum": ("m + share * (g - m)", "g + share * (m - g)", "plain"),
    "leaves the floor out": ("tl.where(floor < eps, eps, floor)", "floor", "no momentum"),
    "leaves the scale of the curvature out": ("floor = rho * ", "floor = ", "short momentum"),
    "decays after the step": ("w = w * keep\n        w = w - ratio * lr", "w = (w - ratio * lr) * keep", "decay"),
    "decays without the device's rate": ("1.0 - rate * weight_decay", "1.0 - weight_decay + 0 * rate", "tensor lr"),
    "takes the neighbor": ("tl.load(indices + columns, ", "1 ^ tl.load(indices + columns, ", "plain"),
    "forgets to store the momentum": ("m.to(exp_avg.dtype.element_ty), mask=touched", "0.0, mask=touched", "plain"),
    "counts in every block": ("mask=program == 0", "mask=program >= 0", "plain"),
}
"""Name -> what is replaced, by what, and the options whose steps see it."""


def mutated(old: str, new: str) -> object:
    """The kernel with one defect, compiled from a file of its own: Triton reads sources."""
    text = Path(kernel.__file__).read_text()
    assert old in text, old
    # It stays until the end: lines are read when the kernel is called.
    path = Path(tempfile.mkdtemp(dir=sys.argv[1])) / "kernel.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import triton

    return triton.jit(module.advance)


def said(call, *arguments, raises: bool = False) -> str | None:
    try:
        call(*arguments)
    except Exception as error:
        if raises and isinstance(error, AssertionError):
            raise
        return traceback.format_exc()[-3000:]
    return None


def survived(call, *arguments) -> str | None:
    """What is wrong with a mutant: the law holds for it, or it fails otherwise than by the law."""
    try:
        return said(call, *arguments, raises=True) or "It survived"
    except AssertionError:
        return None


def main() -> None:
    torch.set_num_threads(1)
    found = {name: said(case, "cpu") for name, case in named().items()}
    defects = {name: (old, new, eager, torch.float32, options) for name, (old, new, options) in MUTANTS.items()}
    defects["does not read whether the gradient is finite"] = ("num_rows * passes.to(tl.int64)", "num_rows", guarded)
    for name, (old, new, law, *arguments) in defects.items():
        with mock.patch.object(fused, "_kernel", mock.Mock(return_value=mutated(old, new))):
            found[f"mutant {name}"] = survived(law, *(arguments or [torch.float32]), "cpu")
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
