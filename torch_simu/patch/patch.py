"""NeuronPatch: the change of selected neurons as a value that can be checked, applied, taken back and saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torch_simu._checks import problem
from torch_simu._files import load_tensors, save_tensors
from torch_simu.deltas import attach_deltas, attached_layers
from torch_simu.deltas.layer import DeltaLayer, detach
from torch_simu.int8 import fingerprint, is_4bit, is_8bit
from torch_simu.layers import attention_projections, neuron_dim, neuron_weight, num_neurons, select_layers
from torch_simu.neurons import NeuronSelection
from torch_simu.patch.audit import Audit
from torch_simu.patch.bits import differing_neurons, sha256_of
from torch_simu.patch.change import Change, change_between

_KIND = "NeuronPatch"

Where = Mapping[str, tuple[int | tuple[int, ...], Tensor]]
"""Tensor name -> what counts its neurons, and those that may change."""


@dataclass(frozen=True, slots=True, eq=False)
class NeuronPatch:
    """The bits that differ between a base and a changed model, neuron by neuron.

    A change of bits is its own inverse: applying and taking back are exact in every dtype. Beside quantized layers the
    deltas themselves are the change, bound to the hash of the codes and scales.

    Attributes:
        changes: Tensor name -> its change.
        provenance: How the change came about, as JSON values.

    Examples:
        >>> base, model = nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(4, 2))
        >>> _ = model.load_state_dict(base.state_dict())
        >>> with torch.no_grad():
        ...     model[0].weight[:, 3] += 1
        >>> patch = NeuronPatch.between(base, model, NeuronSelection({"0": [3]}, {"0": 4}))
        >>> patch
        NeuronPatch(1 tensor, 1 of 4 neurons)
        >>> patch.apply(base)
        >>> torch.equal(base[0].weight, model[0].weight)
        True
    """

    changes: Mapping[str, Change]
    provenance: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def between(
        cls,
        base: nn.Module,
        model: nn.Module,
        selection: NeuronSelection,
        *,
        provenance: Mapping[str, object] | None = None,
    ) -> NeuronPatch:
        """Return the patch that turns `base` into `model`.

        Args:
            base: The model before.
            model: The model after: with changed weights, or with deltas attached.
            selection: The neurons that may differ. Attention projections may differ, too, where the model has them.
            provenance: What to keep with the patch, as JSON values.

        Raises:
            ValueError: If something else differs (the message names it), or nothing does.
            KeyError: If a selected layer is not in the model.
        """
        changes = changes_between(_tensors(base), _tensors(model), _where(base, selection), _whole_names(base))
        plain = dict(base.named_modules())
        for name, layer in attached_layers(model).items():
            if sorted(layer.idx.tolist()) != selection[name].tolist():
                raise ValueError(problem(f"The delta of layer {name!r} is of other neurons", "those of the selection"))
            if name not in plain or fingerprint(plain[name]) != fingerprint(layer):
                raise ValueError(problem(f"The codes of layer {name!r} differ", "those of the base"))
            changes[f"{name}.delta"] = _delta_change(layer)
        if not changes:
            raise ValueError(problem("No bit differs between base and model", "a change", "Is it the same model?"))
        return cls(changes, dict(provenance or {}))

    def apply(self, model: nn.Module) -> None:
        """Put the change on the base, in place; deltas are attached.

        Raises:
            ValueError: If a tensor is not that of the base, to the last bit, or has the change already, or the patch is
                damaged; nothing is changed then.
            KeyError: If a tensor is not in the model.
        """
        self._flip(model, applied=False)

    def revert(self, model: nn.Module) -> None:
        """Take the change off again, in place; deltas are detached.

        Raises:
            ValueError: If a tensor is not as `apply` left it, to the last bit; nothing is changed then.
            KeyError: If a tensor is not in the model.
        """
        self._flip(model, applied=True)

    def verify(self, base: nn.Module, model: nn.Module) -> Audit:
        """Compare every tensor of two models by hash, and say whether the patch and nothing else lies between them."""
        found = dict(_tensors(model))
        found |= {f"{name}.delta": layer.delta.detach() for name, layer in attached_layers(model).items()}
        return audit(self.changes, _tensors(base), found)

    def save(self, path: str | Path) -> None:
        """Write the patch to `path` (safetensors with a JSON header), whole or not at all."""
        tensors, header = self._content()
        save_tensors(path, _KIND, tensors, {**header, "sha256": _digest(tensors, header)})

    @classmethod
    def load(cls, path: str | Path) -> NeuronPatch:
        """Read a patch that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, was changed, or holds something else.
        """
        tensors, header = load_tensors(path, _KIND)
        known: dict[str, object] = {key: header[key] for key in ("changes", "provenance") if key in header}
        if header.get("sha256") != _digest(tensors, known):
            wrong = f"File {str(path)!r} does not have the sha256 that it names"
            raise ValueError(problem(wrong, "what NeuronPatch.save wrote", "It is damaged, or was changed."))
        changes = cast("dict[str, dict[str, Any]]", header["changes"])
        found = {
            name: Change.from_file(entry, tensors[f"{name}:neurons"], tensors[f"{name}:value"])
            for name, entry in changes.items()
        }
        return cls(found, cast("dict[str, object]", header["provenance"]))

    def __repr__(self) -> str:
        selected = sum(len(change.neurons) for change in self.changes.values())
        total = sum(change.num_neurons for change in self.changes.values())
        count = len(self.changes)
        return f"NeuronPatch({count} tensor{'s' * (count != 1)}, {selected} of {total} neurons)"

    def _content(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        tensors: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            tensors |= {f"{name}:neurons": change.neurons, f"{name}:value": change.value.contiguous()}
        header = {
            "changes": {name: change.header() for name, change in self.changes.items()},
            "provenance": dict(self.provenance),
        }
        # As a file gives it back: tuples become lists.
        return tensors, cast("dict[str, object]", json.loads(json.dumps(header)))

    def _flip(self, model: nn.Module, *, applied: bool) -> None:
        tensors, modules = _tensors(model), dict(model.named_modules())
        for name, change in self.changes.items():
            if change.kind == "delta":
                _check_delta(name, change, modules, applied=applied)
                continue
            if name not in tensors:
                raise KeyError(problem(f"Tensor {name!r} is not in the model", "the model that the patch was made for"))
            change.check(name, tensors[name], applied=applied)
            if sha256_of(change.flipped(tensors[name])) != (change.before if applied else change.after):
                raise ValueError(problem(f"The change of tensor {name!r} leads elsewhere", "what its sha256 says"))
        deltas = {name.removesuffix(".delta"): each for name, each in self.changes.items() if each.kind == "delta"}
        # All is checked: from here on nothing is refused.
        if applied:
            for name in deltas:
                detach(modules[name])
        elif deltas:
            neurons = {name: change.neurons for name, change in deltas.items()}
            sizes = {name: change.num_neurons for name, change in deltas.items()}
            for name, delta in attach_deltas(model, NeuronSelection(neurons, sizes)).items():
                with torch.no_grad():
                    delta.copy_(deltas[name].value)
        for name, change in self.changes.items():
            if change.kind != "delta":
                change.flip(tensors[name])


def changes_between(
    base: Mapping[str, Tensor], model: Mapping[str, Tensor], where: Where, whole: Callable[[str], bool]
) -> dict[str, Change]:
    """Return the change of every tensor that differs.

    Args:
        base: The base's tensors; read one at a time.
        model: Those of the changed model.
        where: Which neurons of which tensors may differ.
        whole: Says of the other tensors whether they may.

    Raises:
        ValueError: If one has no counterpart, or differs where it may not.
    """
    if unmatched := sorted({*base} ^ {*model}):
        side = "base" if unmatched[0] in base else "model"
        raise ValueError(problem(f"Tensor {unmatched[0]!r} is in the {side} only", "the same tensors in both"))
    changes = {}
    for name in base:
        before, after = base[name], model[name]
        dim, neurons = where.get(name, (None, None))
        change = change_between(name, before, after, dim, neurons)
        if change is None:
            continue
        if dim is not None and neurons is not None:
            outside = set(differing_neurons(before, after, dim).tolist()) - set(neurons.tolist())
            if outside:
                wrong = f"Neuron {min(outside)} of tensor {name!r} differs and is not selected ({len(outside)} such)"
                raise ValueError(problem(wrong, "selected neurons only"))
        elif not whole(name):
            wrong = f"Tensor {name!r} differs and has no selected neuron"
            raise ValueError(problem(wrong, "changes of selected neurons and attention projections only"))
        changes[name] = change
    return changes


def audit(changes: Mapping[str, Change], base: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> Audit:
    """Compare all tensors by hash, and those that differ with what a patch says of them."""
    rows: dict[str, dict[str, object]] = {}
    problems = []
    for name in dict.fromkeys([*base, *model, *changes]):
        change = changes.get(name)
        before = sha256_of(base[name]) if name in base else None
        after = sha256_of(model[name]) if name in model else None
        expected = (change.before, change.after) if change else (before, before)
        if change is not None and change.kind == "delta":
            # Of a delta the first hash is that of the codes beside it, which are compared on their own.
            expected = (before, change.after)
        if (before, after) == expected:
            rows[name] = {"status": change.kind if change else "unchanged", "before": before, "after": after}
            if change is not None and change.num_neurons:
                rows[name] |= {"selected": len(change.neurons), "of": change.num_neurons}
            continue
        rows[name] = {"status": "unexpected", "before": before, "after": after}
        wanted = "is not as the patch says" if change else "differs and is not in the patch"
        problems.append(f"Tensor {name!r} {wanted}")
    return Audit(rows, tuple(problems))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and persistent buffers but deltas; of quantized layers, codes and scales."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        skipped = module._non_persistent_buffers_set
        own |= {key: value for key, value in module.named_buffers(recurse=False) if key not in skipped}
        if isinstance(module, DeltaLayer):
            own = {key: value for key, value in own.items() if key not in ("delta", "idx", "weight_format")}
        prefix = f"{name}." if name else ""
        if is_8bit(module) or is_4bit(module) or "SCB" in own:
            own.pop("SCB", None)
            digest = bytes.fromhex(fingerprint(module))
            own["weight"] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        for key, value in own.items():
            if isinstance(value, DTensor):
                wrong = f"Tensor {prefix + key!r} is sharded"
                raise ValueError(
                    problem(wrong, "a whole one", "Patch the checkpoint, or the model before fully_shard.")
                )
            if not any(value is other for other in found.values()):
                found[prefix + key] = value.detach() if not isinstance(value, nn.Parameter) else value
    return found


def _where(model: nn.Module, selection: NeuronSelection) -> dict[str, tuple[int | tuple[int, ...], Tensor]]:
    layers = select_layers(model, selection) if len(selection) else {}
    where: dict[str, tuple[int | tuple[int, ...], Tensor]] = {}
    for name, layer in layers.items():
        if num_neurons(layer) != selection.num_neurons[name]:
            wrong = f"Layer {name!r} has {num_neurons(layer)} neurons, not {selection.num_neurons[name]}"
            raise ValueError(problem(wrong, "the selection's", "Was the selection made on another model?"))
        weight = neuron_weight(layer)
        key = next(key for key, param in layer.named_parameters(recurse=False) if param is weight)
        if weight.is_floating_point():
            where[f"{name}.{key}"] = (neuron_dim(layer), selection[name])
    return where


def _whole_names(model: nn.Module) -> Callable[[str], bool]:
    try:
        layers = attention_projections(model)
    except ValueError:
        return lambda name: False
    names = {f"{name}.{key}" for name, layer in layers.items() for key, _ in layer.named_parameters(recurse=False)}
    return names.__contains__


def _delta_change(layer: DeltaLayer) -> Change:
    delta = layer.delta.detach().cpu()
    return Change(
        "delta",
        fingerprint(layer),
        sha256_of(delta),
        str(delta.dtype),
        tuple(delta.shape),
        -1,
        num_neurons(layer),
        layer.idx.cpu(),
        delta,
    )


def _check_delta(name: str, change: Change, modules: Mapping[str, nn.Module], *, applied: bool) -> None:
    layer = name.removesuffix(".delta")
    if layer not in modules:
        raise KeyError(problem(f"Layer {layer!r} is not in the model", "the model that the patch was made for"))
    module = modules[layer]
    if isinstance(module, DeltaLayer) != applied:
        state = ("not applied", "an applied patch") if applied else ("applied already", "the base")
        raise ValueError(problem(f"The patch is {state[0]} to layer {layer!r}", state[1]))
    if isinstance(module, DeltaLayer):
        change.check(name, module.delta, applied=True)
    if (found := fingerprint(module)) != change.before:
        wrong = f"The weight of layer {layer!r} has sha256 {found[:12]}..."
        raise ValueError(problem(wrong, f"{change.before[:12]}...", "The patch was made for another base."))


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {sha256_of(tensors[name])}".encode())
    return digest.hexdigest()
