"""Reading: a checkpoint's tensors as its model would hold them, although it is not loaded."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from torch_simu._checks import problem
from torch_simu._hashes import raw_bytes
from torch_simu.patch.weights import Stored, mapped, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """What a tensor of the model is made of: stored tensors with the pattern each was found by, and how they merge."""

    pieces: tuple[tuple[str, str], ...]
    converter: Any = None
    model: Any = None

    def tensors(self, target: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the pieces become, by the model's names."""
        if self.converter is None:
            return {target: stored[self.pieces[0][0]]}
        # A converter keeps what it was given.
        fresh = copy.deepcopy(self.converter)
        for name, pattern in self.pieces:
            fresh.add_tensor(target, name, pattern, stored[name])
        made = fresh.convert(target, model=self.model, config=self.model.config)
        # With its errors beside it in the first versions of transformers 5.
        made = made[0] if isinstance(made, tuple) else made
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by the names that they have in its model, read one at a time.

    A checkpoint may have other names for them than today's `save_pretrained`, one tensor for each expert, a tied tensor
    twice, or tensors that the model does not read: transformers knows how each becomes the model's, and the same rules
    are used here. Without a configuration that transformers knows the names are those in the files.

    Attributes:
        model: The model, without weights; None where its configuration is not known.
        unread: The tensors that the model does not read.
    """

    def __init__(self, stored: Mapping[str, Stored], model: PreTrainedModel | None) -> None:
        self.model: PreTrainedModel | None = None
        self.unread: frozenset[str] = frozenset()
        self._stored = stored
        # A tensor's name -> the first name that its pieces become, and the pieces; of each place that it is stored at.
        self._places: dict[str, list[tuple[str, _Source]]] = {name: [(name, _Source(((name, ""),)))] for name in stored}
        if model is not None and (places := _places(stored, model)):
            self.model, self._places = model, places
            self.unread = frozenset(places.keys() - model.state_dict().keys())
            self._untie(getattr(model, "all_tied_weights_keys", {}))

    def __getitem__(self, name: str) -> Tensor:
        target, source = self._places[name][0]
        return source.tensors(target, {piece: self._stored[piece].tensor() for piece, _ in source.pieces})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def check_writable(self, name: str) -> None:
        """Raise where a tensor is stored in a form that it cannot be written back to.

        Raises:
            ValueError: If its pieces are neither the tensor itself nor its rows.
        """
        shape = tuple(self[name].shape)
        for target, source in self._places[name]:
            inner = {self._stored[piece].shape for piece, _ in source.pieces}
            rows = target == name and inner == {shape[1:]} and shape[0] == len(source.pieces)
            if source.converter is not None and not rows and not self._is_itself(name, source):
                wrong = f"Tensor {name!r} is stored in another form ({source.pieces[0][0]!r})"
                raise ValueError(problem(wrong, "the model's", "Load the model, call patch.apply(model), and save it."))

    def write(self, folder: Path, name: str, tensor: Tensor) -> None:
        """Write a tensor over the one of that name in a copy of the checkpoint."""
        for _, source in self._places[name]:
            values = [tensor] if len(source.pieces) == 1 else list(tensor)
            for (piece, _), value in zip(source.pieces, values, strict=True):
                with (folder / self._stored[piece].file).open("r+b") as file:
                    file.seek(self._stored[piece].start)
                    file.write(raw_bytes(value))

    def _is_itself(self, name: str, source: _Source) -> bool:
        """Say whether a tensor is stored as it is: a rule of transformers may only ask for its place in memory."""
        pieces = [self._stored[piece].tensor() for piece, _ in source.pieces]
        return (
            len(pieces) == 1 and pieces[0].shape == self[name].shape and raw_bytes(pieces[0]) == raw_bytes(self[name])
        )

    def _untie(self, tied: Mapping[str, str]) -> None:
        """Count tensors that are one in the model once, under the name that `save_pretrained` keeps."""
        for target, source in tied.items():
            if target not in self._places:
                continue
            if source not in self._places:
                self._places[source] = [(source, each) for _, each in self._places.pop(target)]
            elif raw_bytes(self[target]) == raw_bytes(self[source]):
                # Where they differ transformers does not tie them.
                self._places[source] += self._places.pop(target)


@contextmanager
def opened(folder: str | Path) -> Iterator[Checkpoint]:
    """Yield a checkpoint's tensors as its model would hold them, mapped from disk and valid inside the block.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged.
    """
    with mapped(folder) as stored:
        yield Checkpoint(stored, _model_of(folder))


def is_quantized(folder: str | Path) -> bool:
    """Return whether a checkpoint holds codes beside float tensors."""
    return bool(read_config(folder).get("quantization_config"))


def _model_of(folder: str | Path) -> PreTrainedModel | None:
    if not read_config(folder).get("model_type") or is_quantized(folder):
        return None
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except Exception:
        # Whatever a configuration does to transformers: then the names are those in the files, and nothing is unread.
        return None


def _places(stored: Mapping[str, Stored], model: PreTrainedModel) -> dict[str, list[tuple[str, _Source]]]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        # A version with other rules than these.
        return {}
    known = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix = model.base_model_prefix
    merged: dict[str, list[tuple[str, str]]] = {}
    places: dict[str, list[tuple[str, _Source]]] = {}
    for name in sorted(stored, key=_natural):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if target not in known:
            # Its own name, because two that the model does not read may be renamed to one.
            places[name] = [(name, _Source(((name, ""),)))]
        elif pattern is not None:
            merged.setdefault(target, []).append((name, pattern))
        elif target in places:
            raise ValueError(problem(f"Tensor {target!r} is stored twice, once as {name!r}", "once"))
        else:
            places[target] = [(target, _Source(((name, ""),)))]
    for target, pieces in merged.items():
        source = _Source(tuple(pieces), by_pattern[pieces[0][1]], model)
        empty = {name: torch.empty(stored[name].shape, dtype=stored[name].dtype, device="meta") for name, _ in pieces}
        try:
            made = source.tensors(target, empty)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            wrong = f"Tensor {target!r} cannot be made of {pieces[0][0]!r} and its like ({error})"
            raise ValueError(problem(wrong, "all its pieces", "Get the checkpoint again.")) from None
        for name in made:
            places[name] = [(target, source)]
    return places


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
