"""The identity of an objective is the same in every process, and another one for another objective."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models import tiny
from torch_simu.unlearning.identity import identity
from torch_simu.unlearning.objectives import GradDiff

FACTOR = 2.0


def scaled(loss, factor=1.0):
    return factor * loss


def scaled_by(factor):
    return lambda loss: factor * loss


def scaled_here(loss):
    return FACTOR * loss


def scaled_there(loss):
    return scaled_here(loss) + 1


def among(name):
    return name in {"alpha", "beta", "gamma", "delta"}


class Plugin:
    """An objective as a class without a repr."""

    def __init__(self, loss, **more):
        self.loss = loss
        self.__dict__ |= more

    def terms(self, model, forget, retain):
        yield self.loss


class Doubled(Plugin):
    def terms(self, model, forget, retain):
        yield 2 * self.loss


@dataclass
class Hidden:
    """A dataclass whose repr does not show all of it."""

    weights: torch.Tensor
    factor: float = field(default=1.0, repr=False)


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor):
        self.factor = factor


class Head(nn.Module):
    def __init__(self, factor, **more):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.factor, self.more = nn.Linear(2, 2), factor, more


def ring(*values):
    made = list(values)
    made.append(made)
    return made


def redefined(source, name):
    """What a file defines that says something else now."""
    scope = {"__name__": "plugin"}
    exec(source, scope)
    return scope[name]


EXAMPLES = {
    "named": lambda: [GradDiff(1.0), GradDiff(2.0)],
    "function": lambda: [Plugin(scaled), Plugin(scaled_here), Plugin(scaled_there), Plugin(max), Plugin(min)],
    "lambda": lambda: [
        Plugin(lambda x: x + 1),
        Plugin(lambda x: x + 2),
        Plugin(lambda x: x - 1),
        Plugin(lambda x: x + FACTOR),
    ],
    "inner lambda": lambda: [lambda: lambda x: x + 1, lambda: lambda x: x + 2],
    "closure": lambda: [Plugin(scaled_by(1.0)), Plugin(scaled_by(2.0)), Plugin(scaled_by(2))],
    "default": lambda: [lambda x, y=1: x + y, lambda x, y=2: x + y, lambda x, *, y=2: x + y],
    "set in the code": lambda: [among],
    "global": lambda: [redefined(f"FACTOR = {value}\ndef loss(x): return FACTOR * x", "loss") for value in (1, 2)],
    "function of the module": lambda: [
        redefined(f"def inner(x): return {value} * x\ndef loss(x): return inner(x)", "loss") for value in (1, 2)
    ],
    "method": lambda: [redefined(f"class A:\n def terms(self): return {value}", "A")() for value in (1, 2)],
    "partial": lambda: (
        [functools.partial(scaled, factor=value) for value in (1.0, 2.0)] + [functools.partial(scaled, 1.0)]
    ),
    "cached": lambda: [functools.lru_cache(scaled), functools.lru_cache(scaled_here)],
    "class": lambda: [Plugin(1), Doubled(1), Plugin, Doubled],
    "bound method": lambda: [Plugin(1).terms, Plugin(2).terms, Doubled(1).terms],
    "attributes": lambda: [Plugin(None, beta=0.1), Plugin(None, beta=0.2), Plugin(None, gamma=0.1)],
    "hidden fields": lambda: [
        Hidden(torch.zeros(2000)),
        Hidden(torch.zeros(2000), 2.0),
        # The repr of a tensor shows its ends.
        Hidden(torch.zeros(2000).index_fill(0, torch.tensor(1000), 1.0)),
    ],
    "slots": lambda: [Slotted(1), Slotted(2)],
    "set": lambda: [{"alpha", "beta", "gamma"}, {"alpha", "beta"}, frozenset({"alpha", "beta"})],
    "collections": lambda: [(1, 2), [1, 2], [2, 1], {"a": 1}, {"a": 2}, [[1], 2]],
    "path": lambda: [Path("a"), Path("b")],
    "random": lambda: [random.Random(0), random.Random(1)],
    "generator": lambda: [torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)],
    "module": lambda: [
        Head(1.0),
        Head(2.0),
        Head(1.0, weights=[1]),
        Head(1.0, weights=[2]),
        Head(1.0).requires_grad_(False).double(),
    ],
    "model": lambda: [Plugin(None, reference=tiny("llama"))],
    "dtype": lambda: [torch.float16, torch.bfloat16, torch.device("cpu")],
    "itself": lambda: [ring(1), ring(2), ring(1, [])],
    "not to be pickled": lambda: [Plugin(threading.Lock(), beta=1), Plugin(threading.Lock(), beta=2)],
}


def described():
    return {name: [identity(each) for each in make()] for name, make in EXAMPLES.items()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_values_that_differ_are_told_apart_and_equal_ones_are_not(name):
    first, second = ([identity(each) for each in EXAMPLES[name]()] for _ in range(2))
    assert first == second
    assert all(a != b for a, b in itertools.combinations(first, 2))


def test_no_address_is_in_it():
    # Made before and after others, each object lies elsewhere.
    kept = [make() for make in EXAMPLES.values()]
    assert described() == described()
    assert len(kept) == len(EXAMPLES)


@pytest.mark.slow
def test_it_is_the_same_in_another_process_with_another_order_of_sets():
    code = "import json; from tests.unlearning.test_identity import described; print(json.dumps(described()))"
    root = str(Path(__file__).parents[2])
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[-1]
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] == json.dumps(described())
