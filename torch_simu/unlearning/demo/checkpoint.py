"""DemoCheckpoint: a demo as a folder, so that a killed one goes on after the models that are finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from torch_simu._checks import problem
from torch_simu._files import load_tensors, save_tensors
from torch_simu._temporary import remove_leftovers
from torch_simu.attribution import Attribution
from torch_simu.unlearning.checkpoint import Record
from torch_simu.unlearning.report.report import MethodResult, write_json, write_log
from torch_simu.unlearning.report.runs import RESULTS, TAUGHT

_T = TypeVar("_T")

_KIND = "TaughtModel"
_IDENTITY = ("seed", "versions", "settings")
_SHOWN = 3
"""So many differences are named."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What is known of a model of the demo.

    Args:
        result: Its row of the report.
        log: The step log; empty of a model that was taught only.
        attribution: Scores of the forget set; None where none were needed.
    """

    result: MethodResult
    log: Sequence[Record] = ()
    attribution: Attribution | None = None


@dataclass(frozen=True, slots=True)
class DemoCheckpoint:
    """A folder that holds a demo as far as it is: `results.json`, step logs and scores, and the taught models.

    Args:
        folder: The folder; use `open`, which makes it and refuses that of another demo.
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path, report: Mapping[str, Any]) -> DemoCheckpoint:
        """Open the checkpoint of a demo, or begin one.

        Args:
            folder: The folder.
            report: The report without a method, as `Report.to_json` returns it. Its seed, versions and settings say
                which demo it is.

        Raises:
            ValueError: If the folder belongs to another demo, is damaged, or holds something else.
        """
        cls.check(folder, report)
        folder.mkdir(parents=True, exist_ok=True)
        found = cls(folder)
        remove_leftovers(found._results)
        if not found._begun():
            write_json(found._results, report)
        return found

    @classmethod
    def check(cls, folder: Path, report: Mapping[str, Any]) -> None:
        """Raise what `open` would for this `report`, and make nothing.

        Raises:
            ValueError: If the folder holds something else, or another demo.
        """
        found = cls(folder)
        if not folder.exists():
            return
        if not found._results.exists() and found._holds_more():
            wrong = f"Folder {str(folder)!r} is not empty and holds no unfinished demo"
            raise ValueError(problem(wrong, "an empty folder", "Give another, or remove it."))
        if found._begun():
            # As JSON has it, in which a tuple is a list.
            found._compare(json.loads(json.dumps(report)))

    def remove_if_empty(self) -> None:
        """Remove the folder where nothing of the demo was finished yet, so that another one finds no rest of it."""
        if self._results.exists() and not self._begun():
            self._results.unlink()
            self.folder.rmdir()

    def load(self, name: str) -> Finished | None:
        """Read what is known of the model with this `name`; None before it is finished.

        Raises:
            ValueError: If a file is damaged.
        """
        row = self._read()["methods"].get(name)
        if row is None:
            return None
        log, scores = self._log(name), self._scores(name)
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        result = _read(self._results, lambda: MethodResult.from_json(row))
        records = _read(log, lambda: [json.loads(line) for line in lines])
        return Finished(result, records, Attribution.load(scores) if scores.exists() else None)

    def save(self, name: str, finished: Finished) -> None:
        """Write what is known of the model `name` (`finished`). Its row comes last: where that is, all is there."""
        if finished.log:
            write_log(self._log(name), finished.log)
        if finished.attribution is not None:
            finished.attribution.save(self._scores(name))
        content = self._read()
        content["methods"][name] = finished.result.to_json()
        write_json(self._results, content)

    def load_taught(self, name: str, model: PreTrainedModel) -> float | None:
        """Restore the weights of the model `name` that was taught, in place; None before it was.

        Returns:
            How many seconds the teaching took.

        Raises:
            ValueError: If the file is damaged, or of another model.
        """
        path = self._taught(name)
        if not path.exists():
            return None
        tensors, header = load_tensors(path, _KIND)

        def restored() -> float:
            model.load_state_dict(tensors)
            return float(header["seconds"])  # type: ignore[arg-type]

        return _read(path, restored)

    def save_taught(self, name: str, model: PreTrainedModel, seconds: float) -> None:
        """Write the weights of the `model` of this `name`, and the seconds that teaching it took."""
        save_tensors(self._taught(name), _KIND, model.state_dict(), {"seconds": seconds})

    @property
    def _results(self) -> Path:
        return self.folder / RESULTS

    def _log(self, name: str) -> Path:
        return self.folder / f"steps_{name}.jsonl"

    def _scores(self, name: str) -> Path:
        return self.folder / f"attribution_{name}.safetensors"

    def _taught(self, name: str) -> Path:
        return self.folder / f"{TAUGHT}{name}.safetensors"

    def _begun(self) -> bool:
        # A demo that was stopped before it saved anything is in nobody's way.
        return self._results.exists() and (self._holds_more() or bool(self._read()["methods"]))

    def _holds_more(self) -> bool:
        # What begins with a dot is half a file of a killed process.
        return any(path != self._results and not path.name.startswith(".") for path in self.folder.iterdir())

    def _read(self) -> dict[str, Any]:
        def read() -> dict[str, Any]:
            content = json.loads(self._results.read_text(encoding="utf-8"))
            return {**content, "methods": dict(content["methods"])}

        return _read(self._results, read)

    def _compare(self, wanted: Mapping[str, Any]) -> None:
        theirs = dict(_leaves({name: self._read().get(name) for name in _IDENTITY}))
        ours = dict(_leaves({name: wanted[name] for name in _IDENTITY}))
        names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
        if not names:
            return
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        found, expected = (
            ", ".join(f"{name} {each.get(name)!r}" for name in names[:_SHOWN]) + more for each in (theirs, ours)
        )
        wrong = f"Folder {str(self.folder)!r} holds an unfinished demo with {found}"
        advice = "Call it as then to go on, give another --out, or remove that folder to start anew."
        raise ValueError(problem(wrong, expected, advice))


def _leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values of nested mappings under the names that lead to them."""
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for name, branch in tree.items():
        # What the settings are is said by their names alone.
        yield from _leaves(branch, f"{path} {name}".strip().removeprefix("settings ").removeprefix("versions "))


def _read(path: Path, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        wrong = f"File {str(path)!r} is damaged ({type(error).__name__})"
        raise ValueError(problem(wrong, "what was written", "Remove its folder to start anew.")) from error
