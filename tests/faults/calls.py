"""Bad calls of the public API: each a name and what is called, built from the values that people pass by mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_simu import (
    NeuronPatch,
    NeuronSelection,
    SIMUOptimizer,
    attach_deltas,
    attribute_neurons,
    detach_deltas,
    gauss_newton_loss,
    merge_deltas,
    register_neuron_hooks,
)
from torch_simu.deltas import load_deltas, save_deltas
from torch_simu.unlearning.config import UnlearnConfig

Call = Callable[[nn.Module, Path], object]
"""What is called, on a small language model and in a folder that may be written to."""

LAYER = "model.layers.0.mlp.down_proj"
NAN, INF = float("nan"), float("inf")

_NOT_POSITIVE = (-1, -0.5, NAN, INF, -INF, "1", None, True, [1.0], 1j)
_NOT_COUNTS = (0, -3, 1.5, NAN, "3", None, True, [3])
_NOT_SHARES = (-0.1, 1.1, NAN, INF, "0.1", None, True)


def _selection(**changes: Any) -> NeuronSelection:
    return NeuronSelection(**{"neurons": {LAYER: [1, 3]}, "num_neurons": {LAYER: 80}, **changes})


def _batch(**changes: Any) -> dict[str, Any]:
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 4]])
    return {"input_ids": ids, "labels": ids.clone(), **changes}


def selections() -> Iterator[tuple[str, Call]]:
    """Selections that are none."""
    neurons = ([80], [-1], [1.5], ["1"], [None], [[1]], 5, "ab", [10**20], torch.tensor([1.0]), [True])
    for value in neurons:
        yield f"neurons={value!r}"[:60], lambda m, f, v=value: _selection(neurons={LAYER: v})
    for value in (0, -1, 1.5, "80", None, True, [80]):
        yield f"num_neurons={value!r}", lambda m, f, v=value: _selection(num_neurons={LAYER: v})
    yield "no size", lambda m, f: _selection(num_neurons={})
    masks = (torch.ones(4), torch.ones(2, 2, dtype=torch.bool), torch.ones(4, dtype=torch.int64))
    for value in masks:
        yield f"mask {value.dtype} {value.dim()}-D", lambda m, f, v=value: NeuronSelection.from_masks({LAYER: v})
    for value in _NOT_SHARES:
        yield f"fraction={value!r}", lambda m, f, v=value: NeuronSelection.random(m, v)
    yield "select=[]", lambda m, f: NeuronSelection.full(m, [])
    yield "unknown name", lambda m, f: NeuronSelection.full(m, ["nope"])
    yield "bad pattern", lambda m, f: NeuronSelection.full(m, "[")
    yield "unmatched pattern", lambda m, f: NeuronSelection.full(m, "nothing")
    yield "layer without neurons", lambda m, f: NeuronSelection.full(m, ["model"])
    for layer in ("nope", "", None, 3):
        yield f"selection[{layer!r}]", lambda m, f, v=layer: _selection()[v]
        yield f"mask({layer!r})", lambda m, f, v=layer: _selection().mask(v)
    other = {"neurons": {LAYER: [1]}, "num_neurons": {LAYER: 79}}
    yield "sizes differ in |", lambda m, f: _selection() | _selection(**other)
    yield "sizes differ in param_groups", lambda m, f: _selection(**other).param_groups(m, attention="frozen")
    yield "attention=", lambda m, f: _selection().param_groups(m, attention="none")
    yield "unknown layer", lambda m, f: NeuronSelection({"x": [1]}, {"x": 2}).param_groups(m, attention="frozen")
    yield "| with a dict", lambda m, f: _selection() | {LAYER: [1]}
    yield "load nothing", lambda m, f: NeuronSelection.load(f / "nothing")
    yield "load a folder", lambda m, f: NeuronSelection.load(f)
    yield "save into no folder", lambda m, f: _selection().save(f / "no" / "file")
    yield "save onto a folder", lambda m, f: _selection().save(f)


def optimizers() -> Iterator[tuple[str, Call]]:
    """Optimizers with options that are none, and calls that do not fit them."""

    def make(m: nn.Module, **options: Any) -> SIMUOptimizer:
        return SIMUOptimizer(_selection().param_groups(m, attention="frozen"), **options)

    for name in ("lr", "rho", "weight_decay"):
        for value in _NOT_POSITIVE:
            yield f"{name}={value!r}", lambda m, f, n=name, v=value: make(m, **{n: v})
    for name in ("eps", "clip"):
        for value in (0, *_NOT_POSITIVE):
            yield f"{name}={value!r}", lambda m, f, n=name, v=value: make(m, **{n: v})
    for value in _NOT_COUNTS:
        yield f"hessian_interval={value!r}", lambda m, f, v=value: make(m, hessian_interval=v)
    for value in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), ("0.9", 0.9), (None, None)):
        yield f"betas={value!r}", lambda m, f, v=value: make(m, betas=v)
    for value in ("diagonal", "", None, 3):
        yield f"curvature={value!r}", lambda m, f, v=value: make(m, curvature=v)
    for value in (torch.int64, torch.bool, "float7", None, 32):
        yield f"state_dtype={value!r}", lambda m, f, v=value: make(m, state_dtype=v)
    yield "lr of two elements", lambda m, f: make(m, lr=torch.ones(2))
    yield "8-bit state of neurons", lambda m, f: make(m, state_dtype=torch.uint8)
    yield "unnamed with selection", lambda m, f: SIMUOptimizer(m.parameters(), selection=_selection())
    yield (
        "selection not among params",
        lambda m, f: SIMUOptimizer(nn.Linear(2, 2).named_parameters(), selection=_selection()),
    )
    yield "params=[]", lambda m, f: SIMUOptimizer([])
    yield "params=None", lambda m, f: SIMUOptimizer(None)
    for value in ([[1]], [[1], [2], [3]], [1, 2], [[99]], [[-1]], [["a"]], [[1.5]], "ab", 3):
        groups = [{"neurons": value}]
        yield (
            f"neurons={value!r}",
            lambda m, f, g=groups: SIMUOptimizer(
                [{"params": [m.model.layers[0].mlp.down_proj.weight, m.model.layers[1].mlp.down_proj.weight], **g[0]}]
            ),
        )
    for value in (2, -3, (0, 0), (), (0, 5), 1.5, "0", None):
        yield (
            f"neuron_dim={value!r}",
            lambda m, f, v=value: SIMUOptimizer(
                [{"params": [m.model.layers[0].mlp.down_proj.weight], "neurons": [[1]], "neuron_dim": v}]
            ),
        )
    yield "whole-number parameter", lambda m, f: SIMUOptimizer([torch.zeros(2, dtype=torch.int64)])
    for value in (0, -1, NAN, "8", None):
        yield f"num_tokens={value!r}", lambda m, f, v=value: make(m).update_hessian(v)
    for value in (0, -1, NAN, "8"):
        yield f"grad_scale={value!r}", lambda m, f, v=value: make(m).update_hessian(8, grad_scale=v)
    yield "update_hutchinson of gnb", lambda m, f: make(m).update_hutchinson(torch.ones((), requires_grad=True))
    yield "update_hessian of hutchinson", lambda m, f: make(m, curvature="hutchinson").update_hessian(8)
    for value in _NOT_COUNTS:
        yield (
            f"num_probes={value!r}",
            lambda m, f, v=value: make(m, curvature="hutchinson").update_hutchinson(
                torch.ones((), requires_grad=True), num_probes=v
            ),
        )
    for value in (None, {LAYER: [1]}, [1]):
        yield f"change_selection({value!r})", lambda m, f, v=value: make(m).change_selection(v, m)
    yield "change_selection on another model", lambda m, f: make(m).change_selection(_selection(), nn.Linear(2, 2))
    yield "load_state_dict({})", lambda m, f: make(m).load_state_dict({})
    yield (
        "load of another selection",
        lambda m, f: make(m).load_state_dict(
            SIMUOptimizer(_selection(neurons={LAYER: [2]}).param_groups(m, attention="frozen")).state_dict()
        ),
    )


def hooks() -> Iterator[tuple[str, Call]]:
    """Hooks that cannot be registered, or read."""

    def read(m: nn.Module, layer: Any) -> object:
        with register_neuron_hooks(m) as registered:
            return registered[layer]

    for value in (-1, 1.5, None, True, [0]):
        yield f"arg={value!r}", lambda m, f, v=value: register_neuron_hooks(m, arg=v)
    for value in ("sum", "", 3, [], torch.ones(2)):
        yield f"reduce={value!r}", lambda m, f, v=value: register_neuron_hooks(m, reduce=v)
    for value in (torch.int64, torch.bool):
        yield f"accum_dtype={value}", lambda m, f, v=value: register_neuron_hooks(m, accum_dtype=v)
    for value in (torch.ones(2, 4), [[True]], 3, torch.ones(2, 4, dtype=torch.int64)):
        yield f"position_mask={value!r}"[:40], lambda m, f, v=value: register_neuron_hooks(m, position_mask=v)
    for value in ("nothing", "[", ["nope"], []):
        yield f"select={value!r}", lambda m, f, v=value: register_neuron_hooks(m, v)
    yield "select=no layer", lambda m, f: register_neuron_hooks(m, lambda name, module: False)
    for layer in (LAYER, "nope", None):
        yield f"read of {layer!r} before any pass", lambda m, f, v=layer: read(m, v)


def attributions() -> Iterator[tuple[str, Call]]:
    """Attributions of nothing, or by methods that are none."""

    def attribute(m: nn.Module, batches: Any = None, **options: Any) -> object:
        return attribute_neurons(m, [_batch()] if batches is None else batches, **options)

    for value in _NOT_COUNTS:
        yield f"steps={value!r}", lambda m, f, v=value: attribute(m, steps=v)
    for name in ("objective", "rule", "method"):
        for value in ("nope", "", 0.5, 3):
            yield f"{name}={value!r}", lambda m, f, n=name, v=value: attribute(m, **{n: v})
    for value in ("nothing", "[", ["nope"], []):
        yield f"select={value!r}", lambda m, f, v=value: attribute(m, select=v)
    empty = torch.full((2, 4), -100)
    hole = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])
    wrong: list[Any] = [
        [],
        [{}],
        [None],
        ["text"],
        [[1, 2]],
        [_batch(labels=empty)],
        [_batch(labels=torch.ones(2, 3, dtype=torch.int64))],
        [_batch(labels=torch.ones(2, 4))],
        [_batch(labels=torch.full((2, 4), -5))],
        [_batch(input_ids=torch.ones(4, dtype=torch.int64))],
        [_batch(input_ids=[[1, 2, 3, 4]] * 2)],
        [_batch(input_ids=torch.ones(2, 4))],
        [_batch(attention_mask=hole)],
        [_batch(attention_mask=2 * torch.ones(2, 4, dtype=torch.int64))],
        [_batch(attention_mask=torch.zeros(2, 4, dtype=torch.int64))],
        [{"input_ids": torch.ones(2, 4, dtype=torch.int64)}],
    ]
    for number, value in enumerate(wrong):
        yield f"batches {number}", lambda m, f, v=value: attribute(m, v)
    for name in ("select", "top"):
        for value in (-0.5, 1.5, NAN, "0.5", None):
            yield f"{name}({value!r})", lambda m, f, n=name, v=value: getattr(attribute(m), n)(v)
    yield "scope=", lambda m, f: attribute(m).top(0.5, scope="model")
    yield "contrast with a dict", lambda m, f: attribute(m).contrast({})


def deltas() -> Iterator[tuple[str, Call]]:
    """Deltas that cannot be attached, merged, written or read."""

    def twice(m: nn.Module) -> object:
        attach_deltas(m, _selection())
        try:
            return attach_deltas(m, _selection())
        finally:
            detach_deltas(m)

    for value in (None, {LAYER: [1]}, [LAYER], LAYER):
        yield f"selection={value!r}", lambda m, f, v=value: attach_deltas(m, v)
    yield "no such layer", lambda m, f: attach_deltas(m, NeuronSelection({"x": [1]}, {"x": 2}))
    yield "other size", lambda m, f: attach_deltas(m, _selection(num_neurons={LAYER: 79}))
    yield "no linear layer", lambda m, f: attach_deltas(m, NeuronSelection({"model": [1]}, {"model": 80}))
    yield "twice", lambda m, f: twice(m)
    for name, call in (("merge", merge_deltas), ("detach", detach_deltas)):
        yield f"{name} nothing", lambda m, f, c=call: c(m)
    yield "save nothing", lambda m, f: save_deltas(m, f / "deltas")
    yield "load nothing", lambda m, f: load_deltas(m, f / "deltas")


def patches() -> Iterator[tuple[str, Call]]:
    """Patches of nothing."""
    yield "of one model", lambda m, f: NeuronPatch.between(m, m, _selection())
    yield "of two kinds of models", lambda m, f: NeuronPatch.between(m, nn.Linear(2, 2), _selection())
    yield "load nothing", lambda m, f: NeuronPatch.load(f / "nothing")
    yield "load a folder", lambda m, f: NeuronPatch.load(f)


def losses() -> Iterator[tuple[str, Call]]:
    """Logits and labels that do not fit."""
    logits, labels = torch.zeros(2, 4, 5), torch.ones(2, 4, dtype=torch.int64)
    wrong: list[tuple[Tensor, Tensor]] = [
        (logits, labels[:, :3]),
        (logits[0, 0], labels[0, 0]),
        (logits, torch.full_like(labels, -100)),
        (logits[:, 0], labels),
    ]
    for number, value in enumerate(wrong):
        yield f"gauss_newton_loss {number}", lambda m, f, v=value: gauss_newton_loss(*v)


def configurations() -> Iterator[tuple[str, Call]]:
    """Runs with options that are none."""
    for name in ("method", "objective", "rule", "scope", "attention"):
        for value in ("nope", "", 0.5, 3):
            yield f"{name}={value!r}", lambda m, f, n=name, v=value: UnlearnConfig(**{n: v})
    for name in ("lr", "rho", "retain_weight"):
        for value in (-1, NAN, INF, "1", True):
            yield f"{name}={value!r}", lambda m, f, n=name, v=value: UnlearnConfig(**{n: v})
    for name in ("max_steps", "forget_batch_size", "hessian_interval", "attribution_steps"):
        for value in (0, -1, 1.5, "3", True):
            yield f"{name}={value!r}", lambda m, f, n=name, v=value: UnlearnConfig(**{n: v})
    for value in (0, -0.1, 1.1, NAN, "0.1"):
        yield f"fraction={value!r}", lambda m, f, v=value: UnlearnConfig(fraction=v)


KINDS = (selections, optimizers, hooks, attributions, deltas, patches, losses, configurations)
"""Every kind of bad call."""
