"""A command that is killed before any of its file operations goes on when it is called again, and nothing is lost."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import AutoModelForCausalLM

from tests.faults.killing import KILLED, child, content
from tests.language import ROWS, tiny_model, word_tokenizer
from tests.unlearning.demo.tiny import tiny_command
from torch_simu import NeuronPatch, NeuronSelection
from torch_simu.cli import jobs, recording
from torch_simu.cli.app import main
from torch_simu.unlearning.demo import demo
from torch_simu.unlearning.report import facts

FEW = 40

Work = Callable[[], object]


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are written without being drawn: a command is called hundreds of times."""
    monkeypatch.setattr(jobs, "plot_curves", lambda *arguments, **options: arguments[1].write_bytes(b"plot"))
    monkeypatch.setattr(jobs, "plot_attribution", lambda *arguments, **options: arguments[1].write_bytes(b"plot"))
    for name in ("plot_curves", "plot_attribution", "plot_brought_back"):
        monkeypatch.setattr(demo, name, lambda *arguments, **options: [])
    # Otherwise no two reports were the same.
    monkeypatch.setattr(facts, "now", lambda: "2026-11-28T00:00:00+00:00")
    monkeypatch.setattr(recording, "new_key", lambda: "0f" * 32)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a changed one, the patch between them, and two files of rows."""
    folder = tmp_path_factory.mktemp("originals")
    tokenizer = word_tokenizer()
    model = tiny_model(tokenizer)
    changed = copy.deepcopy(model)
    selection = NeuronSelection.random(model, 0.25, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer, neurons in selection.items():
            changed.get_submodule(layer).weight[:, neurons] += 1
    for name, each in (("model", model), ("changed", changed)):
        each.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    NeuronPatch.between(model, changed, selection).save(folder / "patch.safetensors")
    for name, rows in (("forget", ROWS[:1]), ("retain", ROWS[2:3])):
        lines = (json.dumps({"question": row.question, "answer": row.answer}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    # Imports what a command needs when it runs, once and not in every child.
    with suppress(SystemExit):
        works(folder, folder)["unlearn"]()
    shutil.rmtree(folder / "out")
    return folder


def works(originals: Path, place: Path) -> dict[str, Work]:
    """The commands, each with its result at `place / "out"`."""
    out = ["--out", str(place / "out")]
    model, rows = ["--model", str(originals / "model")], ["--forget", str(originals / "forget.jsonl")]
    retain = ["--retain", str(originals / "retain.jsonl")]
    quick = ["--max-steps", "2", "--forget-target", "0", "--fraction", "0.25"]
    short = [*quick, "--max-steps", "1"]
    patch = ["patch", "apply", str(originals / "patch.safetensors"), str(originals / "model"), str(place / "out")]
    return {
        "unlearn": lambda: main(["unlearn", *model, *rows, *retain, *out, *quick]),
        "unlearn --force": lambda: main(["unlearn", *model, *rows, *retain, *out, *quick, "--force"]),
        "unlearn --max-steps 1": lambda: main(["unlearn", *model, *rows, *retain, *out, *short]),
        "attribute": lambda: main(["attribute", *model, *rows, *out]),
        "patch apply": lambda: main(patch),
        "demo": lambda: tiny_demo(out),
    }


def tiny_demo(options: list[str]) -> None:
    """A demo of one method."""
    with tiny_command(("simu_graddiff",)):
        main(["demo", *options])


def kills(operations: int, name: str = "") -> list[int]:
    """The operations to be killed at: all by night; else of many every third, and the last, which place the result.

    Of the demo, which takes longest and places its result as the others do, one in fifteen.
    """
    stride = 1 if operations < FEW or settings.get_current_profile_name() == "nightly" else 3
    if name == "demo" and stride > 1:
        return list(range(8, operations + 1, 15))
    return [number for number in range(1, operations + 1) if number % stride == 0 or number > operations - 20]


def timeless(folder: Path) -> dict[str, str]:
    """Every file and folder below a folder, and what the files hold but wall times, which only reports hold."""
    found = content(folder)
    for path in folder.rglob("report.*"):
        pattern = r"(?<=\"seconds\": )[\d.]+|[\d.]+ (?=\|$)|(?<=<td>)[\d.]+(?=</td></tr>)"
        found[str(path.relative_to(folder))] = re.sub(pattern, "", path.read_text(), flags=re.MULTILINE)
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a command works."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.mark.parametrize("name", ["unlearn", "attribute", "patch apply", "demo"])
def test_a_command_killed_at_any_file_operation_goes_on_and_leaves_nothing_behind(
    name: str, originals: Path, place: Path, record_property: Callable[[str, object], None]
) -> None:
    work = works(originals, place)[name]
    before = content(originals)
    status, operations = child(work, place)
    assert status == 0 and operations >= 10
    expected = timeless(place)
    chosen = kills(operations, name)
    for number in chosen:
        emptied(place)
        assert child(work, place, number)[0] == KILLED, number
        complete = (place / "out").exists()
        # A result that was complete is not overwritten: the call is refused, and clears away all the same.
        assert (child(work, place)[0] == 0) is not complete, number
        assert timeless(place) == expected, number
    assert content(originals) == before
    if name == "unlearn":
        AutoModelForCausalLM.from_pretrained(place / "out")
    record_property("tried", len(chosen))


def test_a_result_is_whole_whenever_the_command_that_replaces_it_is_killed(
    originals: Path, place: Path, record_property: Callable[[str, object], None]
) -> None:
    call = works(originals, place)
    assert child(call["unlearn --max-steps 1"], place)[0] == 0
    old = timeless(place)
    shutil.copytree(place, place.with_name("old"))
    status, operations = child(call["unlearn --force"], place)
    assert status == 0 and operations >= 10
    new = timeless(place)
    assert old != new
    chosen, kept = kills(operations), 0
    for number in chosen:
        emptied(place)
        shutil.copytree(place.with_name("old"), place, dirs_exist_ok=True)
        assert child(call["unlearn --force"], place, number)[0] == KILLED, number
        assert child(call["unlearn"], place)[0] == 1, number
        found = timeless(place)
        run = {key for key in found if key.startswith("out.run")}
        kept += bool(run)
        assert {key: found[key] for key in found.keys() - run} in ((old, new) if not run else (old,)), number
        assert child(call["unlearn --force"], place)[0] == 0, number
        assert timeless(place) == new, number
    # A refused call leaves the run alone that is on its way to another result.
    assert kept >= 10
    record_property("tried", len(chosen))


def emptied(place: Path) -> None:
    """Remove all that is in a folder."""
    shutil.rmtree(place)
    place.mkdir()
