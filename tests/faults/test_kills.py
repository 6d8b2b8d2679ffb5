"""A command that is killed before any of its file operations goes on when it is called again, and nothing is lost."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.faults.killing import KILLED, child, content
from tests.language import ROWS, tiny_model, word_tokenizer
from torch_simu import NeuronPatch, NeuronSelection
from torch_simu.cli.app import main

TIMES = ("report.json", "report.md", "forgetting.png", "attribution.png")
"""Files that hold wall times, or are drawn."""

Work = Callable[[], object]


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
    for name, rows in (("forget", ROWS[:1]), ("retain", ROWS[1:])):
        lines = (json.dumps({"question": row.question, "answer": row.answer}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def works(originals: Path, place: Path) -> dict[str, Work]:
    """The commands, each with its result at `place / "out"`."""
    out = ["--out", str(place / "out")]
    model, rows = ["--model", str(originals / "model")], ["--forget", str(originals / "forget.jsonl")]
    retain = ["--retain", str(originals / "retain.jsonl")]
    quick = ["--max-steps", "2", "--forget-target", "0", "--fraction", "0.25"]
    patch = ["patch", "apply", str(originals / "patch.safetensors"), str(originals / "model"), str(place / "out")]
    return {
        "unlearn": lambda: main(["unlearn", *model, *rows, *retain, *out, *quick]),
        "unlearn --force": lambda: main(["unlearn", *model, *rows, *retain, *out, *quick, "--force"]),
        "attribute": lambda: main(["attribute", *model, *rows, *out]),
        "patch apply": lambda: main(patch),
    }


def kills(work: Work, place: Path, prepare: Work) -> Iterator[int]:
    """Kill the work before its first operation on files, its second, and so on, until it is not killed any more."""
    number = 1
    while True:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        prepare()
        status, _ = child(work, place, number)
        if status != KILLED:
            assert status == 0
            return
        yield number
        number += 1


@pytest.mark.parametrize("name", ["patch apply"])
def test_a_command_killed_at_any_file_operation_goes_on_and_leaves_nothing_behind(
    name: str, originals: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    work = works(originals, place)[name]
    before = content(originals)
    place.mkdir()
    first = works(originals, place)["unlearn"]
    assert child(work, place)[0] == 0
    expected = content(place)
    forced = name.endswith("--force")
    count = 0
    for number in kills(work, place, (lambda: child(first, place)) if forced else (lambda: None)):
        count = number
        if forced:
            # The old result or the new one is there at every moment, under its name or beside it.
            assert any((each / "model.safetensors").is_file() for each in place.iterdir()), f"after kill {number}"
        status = child(work, place)[0]
        if status != 0 and not forced:
            # Killed behind the last step: the result is complete, and is not overwritten.
            assert {key for key in expected if key.startswith("out")} == set(content(place)), f"after kill {number}"
            continue
        assert status == 0, f"after kill {number}"
        found = content(place)
        assert found.keys() == expected.keys(), f"after kill {number}"
        assert {key: found[key] for key in found if Path(key).name not in TIMES} == {
            key: expected[key] for key in expected if Path(key).name not in TIMES
        }, f"after kill {number}"
    assert count >= 5
    assert content(originals) == before
    if name.startswith("unlearn"):
        AutoModelForCausalLM.from_pretrained(place / "out")
