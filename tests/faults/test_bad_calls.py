"""A bad call gets one error of one line that says what was expected, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.faults.calls import KINDS, Call
from tests.models import tiny

CALLS = [pytest.param(call, id=f"{kind.__name__}: {name}") for kind in KINDS for name, call in kind()]
PYTHONS_OWN = ("unsupported operand type(s) for |: 'NeuronSelection'", "optimizer got an empty parameter list")
"""What Python says of an operator, and torch's base class of no parameters."""

ERRORS = (ValueError, TypeError, KeyError, OSError, RuntimeError)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("llama")


def content(model: nn.Module, folder: Path) -> dict[str, object]:
    """All that a call could leave behind: tensors, what trains, classes, hooks and files."""
    modules = dict(model.named_modules())
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "hooks": {name: len(each._forward_pre_hooks) + len(each._forward_hooks) for name, each in modules.items()},
        "files": sorted(path.name for path in folder.rglob("*")),
    }


def test_there_are_at_least_200_bad_calls() -> None:
    assert len(CALLS) >= 200


@pytest.mark.parametrize("call", CALLS)
def test_a_bad_call_says_what_was_expected_and_changes_nothing(call: Call, model: nn.Module, tmp_path: Path) -> None:
    before = content(model, tmp_path)
    with pytest.raises(ERRORS) as caught:
        call(model, tmp_path)
    message = str(caught.value.args[0])
    assert len(message.splitlines()) == 1
    assert ", expected " in message or message.startswith(PYTHONS_OWN)
    after = content(model, tmp_path)
    for key in ("classes", "hooks", "files"):
        assert after[key] == before[key], key
    assert all(torch.equal(value, after["tensors"][name]) for name, value in before["tensors"].items())
