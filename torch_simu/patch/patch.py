"""NeuronPatch: the change of selected neurons as a value that can be checked, applied, taken back and saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu._files import kind_of, load_tensors, save_tensors
from torch_simu._hashes import sha256_of
from torch_simu.bitsandbytes.layers import fingerprint
from torch_simu.deltas import attached_layers
from torch_simu.deltas.attach import attach_places
from torch_simu.deltas.layer import DeltaLayer, detach
from torch_simu.layers import d_model, num_neurons
from torch_simu.neurons import NeuronSelection
from torch_simu.patch.audit import Audit, audit
from torch_simu.patch.beside import check_selected, check_together, layer_of, places_of
from torch_simu.patch.change import Change, changes_between
from torch_simu.patch.model import may_differ_whole, neurons_of, tensors_of

_KIND = "NeuronPatch"


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
        units: bool = False,
        provenance: Mapping[str, object] | None = None,
    ) -> NeuronPatch:
        """Return the patch that turns `base` into `model`.

        Args:
            base: The model before.
            model: The model after: with changed weights, or with deltas attached.
            selection: The neurons that may differ. Attention projections may differ, too, where the model has them.
            units: Whether the rows that make these neurons may differ, or have deltas, too; see
                `NeuronSelection.param_groups`.
            provenance: What to keep with the patch, as JSON values.

        Raises:
            ValueError: If something else differs (the message names it), or nothing does.
            KeyError: If a selected layer is not in the model.
        """
        changes = changes_between(
            tensors_of(base), tensors_of(model), neurons_of(base, selection, units=units), may_differ_whole(base)
        )
        deltas: dict[str, Change] = {}
        for name, layer in attached_layers(model).items():
            deltas |= _delta_changes(name, layer)
        check_selected(deltas, selection, units=units)
        plain = dict(base.named_modules())
        for name, change in deltas.items():
            if (other := layer_of(name)) not in plain or fingerprint(plain[other]) != change.before:
                raise ValueError(problem(f"The codes of layer {other!r} differ", "those of the base"))
        changes |= deltas
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
        found = dict(tensors_of(model))
        codes = {}
        for name, layer in attached_layers(model).items():
            for key, delta in layer.deltas().items():
                found[f"{name}.{key}"] = delta.detach()
                change = self.changes.get(f"{name}.{key}")
                if change is not None and change.is_at(layer.idx, rows=layer.rows):
                    codes[f"{name}.{key}"] = fingerprint(layer)
        return audit(self.changes, tensors_of(base), found, codes=codes)

    def save(self, path: str | Path) -> None:
        """Write the patch to `path` (safetensors with a JSON header), whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            tensors |= {f"{name}:neurons": change.neurons, f"{name}:value": change.value.contiguous()}
        changes = {name: change.header() for name, change in self.changes.items()}
        save_tensors(path, _KIND, tensors, {"changes": changes, "provenance": dict(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> NeuronPatch:
        """Read a patch that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, was changed, or holds something else.
        """
        tensors, header = load_tensors(path, _KIND)
        try:
            changes = cast("dict[str, dict[str, Any]]", header["changes"])
            found = {
                name: Change.from_file(entry, tensors[f"{name}:neurons"], tensors[f"{name}:value"])
                for name, entry in changes.items()
            }
            return cls(found, dict(cast("dict[str, object]", header["provenance"])))
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, ZeroDivisionError) as error:
            wrong = f"File {str(path)!r} holds no consistent patch ({error})"
            raise ValueError(problem(wrong, "what NeuronPatch.save wrote", "The file is damaged.")) from None

    @staticmethod
    def is_file(path: str | Path) -> bool:
        """Return whether a file holds a patch, as its header says."""
        return kind_of(path) == _KIND

    def __repr__(self) -> str:
        parts: dict[str, list[Change]] = {"neurons": [], "rows": []}
        for change in self.changes.values():
            parts["rows" if change.of_rows else "neurons"].append(change)
        said = [
            f"{sum(len(each.neurons) for each in found)} of {sum(each.num_neurons for each in found)} {what}"
            for what, found in parts.items()
            if found or what == "neurons"
        ]
        count = len(self.changes)
        return f"NeuronPatch({count} tensor{'s' * (count != 1)}, {', '.join(said)})"

    def _flip(self, model: nn.Module, *, applied: bool) -> None:
        tensors, modules = tensors_of(model), dict(model.named_modules())
        for name, change in self.changes.items():
            if change.is_delta:
                _check_delta(name, self.changes, modules, applied=applied)
                continue
            if name not in tensors:
                raise KeyError(problem(f"Tensor {name!r} is not in the model", "the model that the patch was made for"))
            change.check(name, tensors[name], applied=applied)
            if sha256_of(change.flipped(tensors[name])) != (change.before if applied else change.after):
                raise ValueError(problem(f"The change of tensor {name!r} leads elsewhere", "what its sha256 says"))
        deltas = {layer_of(name): each for name, each in self.changes.items() if each.is_delta}
        # All is checked: from here on nothing is refused.
        if applied:
            for name in deltas:
                detach(modules[name])
        elif deltas:
            attach_places(model, *places_of(deltas))
            for name, change in self.changes.items():
                if change.is_delta:
                    layer, _, key = name.rpartition(".")
                    with torch.no_grad():
                        cast("DeltaLayer", modules[layer]).deltas()[key].copy_(change.value)
        for name, change in self.changes.items():
            if not change.is_delta:
                change.flip(tensors[name])


def _delta_changes(name: str, layer: DeltaLayer) -> dict[str, Change]:
    size = d_model(layer) if layer.rows else num_neurons(layer)
    beside = fingerprint(layer)
    return {
        # Of each its own indices, because files refuse tensors that share memory.
        f"{name}.{key}": Change.of_delta(
            delta.detach().cpu(), layer.idx.cpu().clone(), of=size, rows=layer.rows, beside=beside
        )
        for key, delta in layer.deltas().items()
    }


def _check_delta(name: str, changes: Mapping[str, Change], modules: Mapping[str, nn.Module], *, applied: bool) -> None:
    layer, _, key = name.rpartition(".")
    change = changes[name]
    if layer not in modules:
        raise KeyError(problem(f"Layer {layer!r} is not in the model", "the model that the patch was made for"))
    module = modules[layer]
    if isinstance(module, DeltaLayer) != applied:
        state = ("not applied", "an applied patch") if applied else ("applied already", "the base")
        raise ValueError(problem(f"The patch is {state[0]} to layer {layer!r}", state[1]))
    check_together(name, changes)
    biased = change.of_rows and module.bias is not None
    if (f"{layer}.delta_bias" in changes) != biased:
        wrong = f"Layer {layer!r} has {'a' if biased else 'no'} bias"
        raise ValueError(problem(wrong, "as in the patch's base", "The patch was made for another base."))
    if isinstance(module, DeltaLayer):
        change.check(name, module.deltas()[key], applied=True)
        if not change.is_at(module.idx, rows=module.rows):
            wrong = f"The delta of layer {layer!r} is of other neurons"
            raise ValueError(problem(wrong, "those of the patch", "The patch is not applied."))
    if (found := fingerprint(module)) != change.before:
        wrong = f"The weight of layer {layer!r} has sha256 {found[:12]}..."
        raise ValueError(problem(wrong, f"{change.before[:12]}...", "The patch was made for another base."))
