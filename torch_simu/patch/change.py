"""Change: what a patch does to one tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from torch_simu._checks import problem
from torch_simu._hashes import sha256_of
from torch_simu.columns import NeuronDim, num_columns
from torch_simu.patch.bits import bits_of, check_alike, columns_of, differing_neurons

Kind = Literal["columns", "rows", "whole", "delta", "delta_rows"]

RESAVE = (
    "Of a checkpoint on disk: load the base as it was loaded for the change, save it once with save_pretrained, and "
    "give that folder."
)
"""What helps where two checkpoints hold the same model in different forms."""


class Place(NamedTuple):
    """Where a tensor may change.

    Attributes:
        dim: What counts its neurons.
        neurons: Those that may change. Shape: `(num_selected,)`.
        kind: What belongs to one of them: "columns", or "rows" where they are outputs.
    """

    dim: NeuronDim
    neurons: Tensor
    kind: Literal["columns", "rows"] = "columns"


Where = Mapping[str, Place]
"""Tensor name -> where it may change."""


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """The change of one tensor.

    Attributes:
        kind: "columns": bits of selected neurons; "rows": bits of what makes them; "whole": bits of all; "delta": a
            delta of columns beside a layer's codes; "delta_rows": one of rows.
        before: sha256 of the tensor before; of a delta, that of the codes and scales beside it.
        after: sha256 of the tensor after; of a delta, its own.
        dtype: Of the tensor, as torch names it.
        shape: Of the tensor.
        dim: What counts the neurons; None for a whole tensor.
        num_neurons: How many neurons there are; 0 for a whole tensor.
        neurons: The selected ones. Shape: `(num_selected,)`.
        value: The flipped bits, `(num_selected, ...)` or the tensor's shape; or the delta.
    """

    kind: Kind
    before: str
    after: str
    dtype: str
    shape: tuple[int, ...]
    dim: NeuronDim | None
    num_neurons: int
    neurons: Tensor
    value: Tensor

    @property
    def is_delta(self) -> bool:
        """Whether it is a delta, of columns or of rows."""
        return self.kind in ("delta", "delta_rows")

    @property
    def of_rows(self) -> bool:
        """Whether its neurons are outputs: rows that make neurons, of weights or of a delta."""
        return self.kind in ("rows", "delta_rows")

    @classmethod
    def of_delta(cls, delta: Tensor, indices: Tensor, *, of: int, rows: bool, beside: str) -> Change:
        """Return a delta as a change of the layer without it.

        Args:
            delta: Its values.
            indices: The neurons of its columns, or the outputs of its rows.
            of: How many neurons, or outputs, the layer has.
            rows: Whether it is of rows.
            beside: sha256 of the codes and scales, or the weight, beside it.
        """
        kind: Kind = "delta_rows" if rows else "delta"
        dtype, shape, dim = str(delta.dtype), tuple(delta.shape), 0 if rows else -1
        return cls(kind, beside, sha256_of(delta), dtype, shape, dim, of, indices, delta)

    def is_at(self, indices: Tensor, *, rows: bool) -> bool:
        """Say whether this delta is of these columns, or rows: its hash is that of the values alone."""
        return self.of_rows == rows and torch.equal(self.neurons, indices.to(self.neurons.device))

    def check(self, name: str, tensor: Tensor, *, applied: bool) -> None:
        """Raise where a tensor is not what the patch goes on, or comes off.

        Raises:
            ValueError: If its bits are others; the message says whether the patch is on it already.
        """
        if str(tensor.dtype) != self.dtype or tuple(tensor.shape) != self.shape:
            wrong = f"Tensor {name!r} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
            raise ValueError(problem(wrong, f"{self.shape} and {self.dtype}", "Was the patch made for another model?"))
        found = sha256_of(tensor)
        if found == (self.after if applied else self.before):
            return
        if found == (self.before if applied else self.after):
            state = ("not applied", "an applied patch") if applied else ("applied already", "the base")
            raise ValueError(problem(f"The patch is {state[0]} to tensor {name!r}", state[1]))
        wrong = f"Tensor {name!r} has sha256 {found[:12]}..."
        expected = f"{(self.after if applied else self.before)[:12]}..."
        raise ValueError(
            problem(wrong, expected, "The patch was made for another base, or this one was changed since.")
        )

    def flip(self, tensor: Tensor) -> None:
        """Put the change on a tensor, or take it off again: it is the same, and exact."""
        bits = bits_of(tensor)
        if self.dim is None:
            bits.bitwise_xor_(self.value.to(bits.device))
        else:
            columns_of(bits, self.dim, self.neurons).xor_(bits, self.value.to(bits.device))

    def flipped(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor with the change on, or off."""
        copy = tensor.detach().clone()
        self.flip(copy)
        return copy

    def header(self) -> dict[str, object]:
        """Return all but the tensors."""
        keys = ("kind", "before", "after", "dtype", "shape", "dim", "num_neurons")
        return {key: getattr(self, key) for key in keys}

    @classmethod
    def from_file(cls, header: Mapping[str, Any], neurons: Tensor, value: Tensor) -> Change:
        """Return the change whose `header` and tensors were written.

        Raises:
            ValueError: If they do not fit each other.
            KeyError: If something is missing.
        """
        dim = header["dim"]
        dim = tuple(dim) if isinstance(dim, list) else dim
        fixed = {key: header[key] for key in ("kind", "before", "after", "dtype", "num_neurons")}
        found = cls(**fixed, shape=tuple(header["shape"]), dim=dim, neurons=neurons, value=value)
        found._check_consistent()
        return found

    def _check_consistent(self) -> None:
        if not (_is_hash(self.before) and _is_hash(self.after)):
            raise ValueError(f"its hashes are {self.before!r} and {self.after!r}")
        if self.kind not in get_args(Kind) or self.neurons.dtype != torch.int64 or self.neurons.dim() != 1:
            raise ValueError(f"its kind is {self.kind!r}, its neurons are {self.neurons.dtype}")
        if len(self.neurons) and not 0 <= int(self.neurons.min()) <= int(self.neurons.max()) < self.num_neurons:
            raise ValueError(f"it changes neuron {int(self.neurons.max())} of {self.num_neurons}")
        shape = self.shape
        if self.kind in ("columns", "rows"):
            dims = (self.dim,) if isinstance(self.dim, int) else self.dim or ()
            counted = {range(len(shape))[each] for each in dims}
            kept = tuple(size for each, size in enumerate(shape) if each not in counted)
            if math.prod(shape[each] for each in counted) != self.num_neurons:
                raise ValueError(f"dimension {self.dim} of shape {shape} does not count {self.num_neurons} neurons")
            shape = (len(self.neurons), *kept)
        if tuple(self.value.shape) != shape:
            raise ValueError(f"its value is of shape {tuple(self.value.shape)}, not {shape}")
        # That of a bias, which has rows only, is of one dimension.
        num_dims = (1, 2) if self.of_rows else (2,)
        if self.is_delta and (len(shape) not in num_dims or shape[0 if self.of_rows else 1] != len(self.neurons)):
            raise ValueError(f"its delta of {len(self.neurons)} neurons is of shape {shape}")
        if self.is_delta and not bool(self.value.isfinite().all()):
            raise ValueError("its delta is not finite")


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def change_between(name: str, before: Tensor, after: Tensor, place: Place | None) -> Change | None:
    """Return the change from one tensor to another, or None where no bit differs.

    Args:
        name: The tensor's name, for messages.
        before: The base's.
        after: The changed one.
        place: Where they may differ; None: as a whole.

    Raises:
        ValueError: If shapes or dtypes differ.
    """
    check_alike(name, before, after, RESAVE)
    hashes = sha256_of(before), sha256_of(after)
    if hashes[0] == hashes[1]:
        return None
    shape, dtype = tuple(before.shape), str(before.dtype)
    if place is None:
        value = (bits_of(before) ^ bits_of(after)).cpu()
        return Change("whole", *hashes, dtype, shape, None, 0, torch.zeros(0, dtype=torch.int64), value)
    dim, neurons, kind = place
    value, other = (columns_of(each, dim, neurons).gather(bits_of(each)) for each in (before, after))
    return Change(kind, *hashes, dtype, shape, dim, num_columns(shape, dim), neurons.cpu(), (value ^ other).cpu())


def changes_between(
    base: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    where: Where,
    whole: Callable[[str], bool],
    *,
    unread: Collection[str] = (),
) -> dict[str, Change]:
    """Return the change of every tensor that differs.

    Args:
        base: The base's tensors; read one at a time.
        model: Those of the changed model.
        where: Which neurons of which tensors may differ.
        whole: Says of the other tensors whether they may.
        unread: Tensors that only one side may have, because no model reads them.

    Raises:
        ValueError: If one has no counterpart, or differs where it may not.
    """
    if unmatched := sorted(({*base} ^ {*model}) - {*unread}):
        side = "base" if unmatched[0] in base else "model"
        wrong = f"Tensor {unmatched[0]!r} is in the {side} only"
        raise ValueError(problem(wrong, "the same tensors in both", RESAVE))
    changes = {}
    for name in base:
        if name not in model:
            continue
        before, after = base[name], model[name]
        place = where.get(name)
        change = change_between(name, before, after, place)
        if change is None:
            continue
        if place is not None:
            outside = set(differing_neurons(before, after, place.dim).tolist()) - set(place.neurons.tolist())
            if outside:
                what = "Row" if place.kind == "rows" else "Neuron"
                wrong = f"{what} {min(outside)} of tensor {name!r} differs and is not selected ({len(outside)} such)"
                raise ValueError(problem(wrong, "selected neurons only"))
        elif not whole(name):
            wrong = f"Tensor {name!r} differs and has no selected neuron"
            raise ValueError(problem(wrong, "changes of selected neurons and attention projections only"))
        changes[name] = change
    return changes
