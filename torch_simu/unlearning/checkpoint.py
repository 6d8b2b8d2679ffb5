"""RunCheckpoint: an unlearning run as a folder, so that a killed run goes on bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_simu._checks import problem
from torch_simu._files import header_of, load_tensors, replacing, save_tensors
from torch_simu._hashes import sha256_of_all
from torch_simu._temporary import remove_leftovers
from torch_simu.attribution import Attribution
from torch_simu.neurons import NeuronSelection
from torch_simu.unlearning.adversary import Adversary

_KIND = "UnlearningRun"
_FILE = "run.safetensors"
_SELECTION = "selection.safetensors"
_MARK = "fingerprint.txt"
_COUNTERS = (bool, int, float)

Record = dict[str, Any]
"""One line of the step log: `step` and what was measured at it."""


def fingerprint(configuration: Mapping[str, object], tensors: Iterable[Tensor]) -> str:
    """Return a sha256 over a configuration and the raw bytes of tensors of any shape.

    Examples:
        >>> fingerprint({"seed": 0}, []) == fingerprint({"seed": 1}, [])
        False
    """
    start = json.dumps(configuration, sort_keys=True)
    return sha256_of_all((("", tensor) for tensor in tensors), start)


def saved_steps(folder: Path) -> int | None:
    """Return how many steps of a run are saved in a folder; 0: the neurons are chosen; None: nothing to go on from."""
    # What is damaged is said when it is read.
    with suppress(KeyError, TypeError, ValueError):
        if (header := header_of(folder / _FILE)) is not None:
            return len(_log(header))
    return 0 if (folder / _SELECTION).exists() else None


@dataclass(frozen=True, slots=True)
class RunCheckpoint:
    """A folder that holds a run: selection and scores of the first step, then weights, optimizer and log of the second.

    Args:
        folder: The folder; use `open`, which makes it and refuses that of another run.
        fingerprint: Of configuration, data and starting weights: a run goes on only where it came from.
    """

    folder: Path
    fingerprint: str

    @classmethod
    def open(cls, folder: Path, fingerprint: str) -> RunCheckpoint:
        """Open the checkpoint of a run, or begin one.

        Raises:
            ValueError: If the folder belongs to another run or holds something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / _MARK
        remove_leftovers(mark)
        held = [path for path in folder.iterdir() if path != mark]
        if not mark.exists() and held:
            raise ValueError(problem(f"Folder {str(folder)!r} is not empty and holds no run", "an empty folder"))
        # A run that was stopped before it saved anything is in nobody's way.
        if held and mark.read_text().strip() != fingerprint:
            wrong = f"Checkpoint {str(folder)!r} belongs to another run"
            raise ValueError(
                problem(wrong, "the same model, data, objective and configuration", "Remove it to start anew.")
            )
        with replacing(mark) as temporary:
            temporary.write_text(fingerprint)
        return cls(folder, fingerprint)

    def remove_if_empty(self) -> None:
        """Remove the folder where nothing of the run was written yet, so that a corrected call is not in its way."""
        if [path.name for path in self.folder.iterdir()] == [_MARK]:
            (self.folder / _MARK).unlink()
            self.folder.rmdir()

    def save_localized(self, selection: NeuronSelection, attribution: Attribution) -> None:
        """Write the result of the first step: the selection, and the attribution that it is from."""
        attribution.save(self.folder / "attribution.safetensors")
        # The selection comes last: where it is, the first step is complete.
        selection.save(self.folder / _SELECTION)

    def localized(self) -> tuple[NeuronSelection, Attribution] | None:
        """Read the result of the first step; None before it is complete."""
        if not (self.folder / _SELECTION).exists():
            return None
        selection = NeuronSelection.load(self.folder / _SELECTION)
        return selection, Attribution.load(self.folder / "attribution.safetensors")

    def save(
        self,
        params: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        log: list[Record],
        adversary: Adversary | None = None,
    ) -> None:
        """Write trained weights (`params`), states of optimizer and adversary, and step log, whole or not at all."""
        state = optimizer.state_dict()
        tensors = {f"weight/{name}": param.detach() for name, param in params.items()}
        for index, entry in state["state"].items():
            tensors |= {f"state/{index}/{key}": value for key, value in entry.items()}
        if adversary is not None:
            tensors |= {f"adversary/{name}": tensor for name, tensor in adversary.state().items()}
        counters = [{k: v for k, v in group.items() if isinstance(v, _COUNTERS)} for group in state["param_groups"]]
        # As text, because a header is written with its keys sorted: a resumed log would be written in another order.
        save_tensors(self.folder / _FILE, _KIND, tensors, {"counters": counters, "log": json.dumps(log)})

    def load(
        self, params: Mapping[str, nn.Parameter], optimizer: Optimizer, adversary: Adversary | None = None
    ) -> list[Record]:
        """Restore weights (`params`), optimizer and adversary; return the step log, empty where there is no file.

        Raises:
            ValueError: If the file is damaged.
        """
        if not (self.folder / _FILE).exists():
            return []
        tensors, header = load_tensors(self.folder / _FILE, _KIND)
        state = optimizer.state_dict()
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "state":
                index, _, key = rest.partition("/")
                entries.setdefault(int(index), {})[key] = tensor
        counters = cast("list[dict[str, object]]", header["counters"])
        groups = [{**group, **saved} for group, saved in zip(state["param_groups"], counters, strict=True)]
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(tensors[f"weight/{name}"])
        if adversary is not None:
            own = {name: tensor for name, tensor in tensors.items() if name.startswith("adversary/")}
            adversary.load({name.removeprefix("adversary/"): tensor for name, tensor in own.items()})
        return _log(header)


def _log(header: Mapping[str, object]) -> list[Record]:
    log = header["log"]
    # Earlier versions wrote it as it is.
    return cast("list[Record]", json.loads(log) if isinstance(log, str) else log)
