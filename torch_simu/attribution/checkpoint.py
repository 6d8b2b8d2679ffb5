"""Checkpoint: partial sums in a file, so that a long attribution can go on after an interruption."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch import nn

from torch_simu._checks import problem
from torch_simu._files import load_tensors, replacing, save_tensors
from torch_simu._hashes import sha256_of_all
from torch_simu.attribution.methods.sums import LayerSum
from torch_simu.layers.dtensors import is_dtensor

_KIND = "AttributionSums"
_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class Partial:
    """Sums over the sequences that are done.

    Attributes:
        sums: Layer -> its sums.
        num_sequences: How many sequences are done, in their order.
    """

    sums: dict[str, LayerSum]
    num_sequences: int = 0


@dataclass(slots=True, eq=False)
class Checkpoint:
    """A file that holds the partial sums of one attribution.

    Args:
        path: The file; None writes nothing. A random key lies beside it.
        configuration: What must be equal for the sums to be continued.
        data: A hash of the data, which must be equal, too. It is written under the key only: who has the file alone
            cannot test guesses of the data by it.
    """

    path: str | Path | None
    configuration: Mapping[str, object]
    data: str = ""
    _written: float = field(default_factory=time.monotonic)

    def load(self, fresh: Partial) -> Partial:
        """Return the partial sums in the file, or `fresh` if there is no file.

        Raises:
            ValueError: If the file belongs to another attribution, or is damaged.
        """
        if self.path is None or not Path(self.path).exists():
            return fresh
        tensors, header = load_tensors(self.path, _KIND)
        # Through JSON, as the file's were: tuples become lists.
        expected = json.loads(json.dumps(dict(self.configuration)))
        found = cast("dict[str, object]", header["configuration"])
        if found != expected:
            key = next(key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key))
            wrong = f"File {str(self.path)!r} was written with {key} {found.get(key)!r}"
            raise ValueError(problem(wrong, f"{expected.get(key)!r}", "Delete the file, or give another path."))
        if not self._key.exists() or not hmac.compare_digest(str(header.get("data")), self._keyed_data()):
            wrong = f"File {str(self.path)!r} was written for other data, or its key is gone"
            raise ValueError(problem(wrong, "the same samples", "Delete the file, or give another path."))
        numbers = cast("dict[str, list[float]]", header["sums"])
        sums = {
            layer: LayerSum.of([tensors[name] for name in _names(layer, each)], *numbers[layer])
            for layer, each in fresh.sums.items()
        }
        return Partial(sums, cast("int", header["num_sequences"]))

    def save(self, partial: Partial, *, now: bool = False) -> None:
        """Write the sums, whole or not at all; at most every ten seconds unless `now`."""
        if self.path is None or not (now or time.monotonic() - self._written >= _SECONDS):
            return
        header = {
            "configuration": dict(self.configuration),
            "data": self._keyed_data(),
            "sums": {layer: each.numbers for layer, each in partial.sums.items()},
            "num_sequences": partial.num_sequences,
        }
        tensors = {
            name: tensor
            for layer, each in partial.sums.items()
            for name, tensor in zip(_names(layer, each), each.tensors, strict=True)
        }
        save_tensors(self.path, _KIND, tensors, header)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Delete the file and its key, because the attribution is complete."""
        if self.path is not None:
            Path(self.path).unlink(missing_ok=True)
            self._key.unlink(missing_ok=True)

    @property
    def _key(self) -> Path:
        return Path(f"{self.path}.key")

    def _keyed_data(self) -> str:
        if not self._key.exists():
            with replacing(self._key) as temporary:
                temporary.write_text(secrets.token_hex(32))
        return hmac.new(self._key.read_bytes(), self.data.encode(), hashlib.sha256).hexdigest()


def _names(layer: str, found: LayerSum) -> list[str]:
    return [layer, f"{layer}/variance", f"{layer}/difference"][: len(found.tensors)]


def config_hash(model: nn.Module) -> str:
    """Return the sha256 of the model's configuration, without its name and the library's version."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    ignored = ("_name_or_path", "transformers_version")
    config = {key: value for key, value in to_dict().items() if key not in ignored}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """Return the sha256 of all parameters and buffers, bit by bit; of sharded ones, of this process's shards."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    mine = ((name, whole.to_local() if is_dtensor(whole) else whole) for name, whole in tensors)
    return sha256_of_all((name, tensor) for name, tensor in mine if tensor.device.type != "meta")
