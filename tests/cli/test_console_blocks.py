"""What the pages tell a newcomer to type works, line by line, on a real small model and the files it made."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

from tests.language import ROWS, memorizing_model, tiny_model, word_tokenizer
from tests.rules.sources import ROOT
from torch_simu.cli.app import main
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.steps import Stepper

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```console[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TARGET_MISSED = 3
"""The status of a run that ends before the forget target is reached."""


def lines_of(page: Path) -> list[list[str]]:
    """The commands of a page's console blocks, as words."""
    blocks = BLOCK.findall(page.read_text())
    return [words for block in blocks for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def run(*arguments: object) -> int:
    """Run the command line and return its exit status."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def quick(words: list[str]) -> list[str]:
    """A command of which a pilot lasts a second, and not minutes; what it does has tests of its own."""
    return ["1e-2" if before == "--minutes" else word for before, word in zip(["", *words], words, strict=False)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that knows all rows and one that knows none, under the names that the pages use."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = word_tokenizer()
    memorizing_model(tokenizer).save_pretrained(folder / "MODEL_DIR")
    tiny_model(tokenizer).save_pretrained(folder / "NEVER_SAW_DIR")
    for name in ("MODEL_DIR", "NEVER_SAW_DIR"):
        tokenizer.save_pretrained(folder / name)
    # Of the same words, and in neither set.
    unseen = [Row(ROWS[0].question, ROWS[2].answer), Row(ROWS[1].question, ROWS[0].answer)]
    for name, rows in (("forget", ROWS[:2]), ("retain", ROWS[2:]), ("unseen", unseen)):
        text = "".join(json.dumps({"question": row.question, "answer": row.answer}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where commands run."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if lines_of(page)], ids=lambda page: page.name)
def test_the_console_blocks_of_a_page_run_one_after_the_other(page, place):
    for words in lines_of(page):
        if words[0] == "torch-simu":
            # The demo trains for minutes; what it does has tests of its own.
            rest = [*words[1:], "--help"] if words[1:] == ["demo"] else words[1:]
            assert run(*quick(rest)) in (0, TARGET_MISSED), words
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
            assert all((ROOT / word.partition("=")[2]).exists() for word in words[2:]), words
        elif words[:2] == ["pip", "install"]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2])
            assert named and set((named[1] or "cli").split(",")) <= extras.keys(), words
        else:
            assert words[:2] == ["python", "-m"], words
            module = ROOT / words[2].replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), words


UNLEARN = ("unlearn", "--model", "MODEL_DIR", "--forget", "forget.jsonl", "--retain", "retain.jsonl")
QUICK = ("--max-steps", 100)
SETS = ("--forget", "forget.jsonl", "--retain", "retain.jsonl")


def forget_probability(path: str, name: str) -> float:
    """The mean forget probability of one of the models of a report."""
    return json.loads(Path(path).read_text())["methods"][name]["forget"]["probability"]


def content(folder: str) -> dict[str, bytes]:
    """The weights of a checkpoint, as bytes."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("model*.safetensors")}


def test_what_was_forgotten_travels_as_a_patch_and_comes_back(place, capsys):
    assert run(*UNLEARN, "--out", "OUT", *QUICK) == 0
    assert run("evaluate", "--model", "OUT", *SETS, "--reference", "MODEL_DIR", "--out", "figures.json") == 0
    assert forget_probability("figures.json", "model") <= 0.1 < 0.9 < forget_probability("figures.json", "reference")
    assert run("attribute", "--model", "OUT", "--forget", "forget.jsonl", "--out", "attributed") == 0
    assert run("patch", "create", "MODEL_DIR", "OUT", "OUT/selection.safetensors", "patch.safetensors") == 0
    assert run("patch", "show", "patch.safetensors") == 0
    assert "down_proj" in capsys.readouterr().out
    assert run("patch", "apply", "patch.safetensors", "MODEL_DIR", "applied") == 0
    assert run("patch", "verify", "patch.safetensors", "MODEL_DIR", "applied") == 0
    assert run("patch", "verify", "patch.safetensors", "MODEL_DIR", "OUT") == 0
    assert run("patch", "revert", "patch.safetensors", "OUT", "reverted") == 0
    assert content("reverted") == content("MODEL_DIR") != content("OUT") == content("applied")


def test_a_second_request_starts_from_the_result_of_the_first(place):
    assert run(*UNLEARN, "--out", "OUT", *QUICK) == 0
    rows = Path("retain.jsonl").read_text().splitlines(keepends=True)
    Path("second.jsonl").write_text(rows[0])
    Path("kept.jsonl").write_text("".join(rows[1:]))
    sets = ("--forget", "second.jsonl", "--retain", "kept.jsonl")
    assert run("unlearn", "--model", "OUT", *sets, "--out", "OUT2", *QUICK) == 0
    assert forget_probability("OUT2/report.json", "simu") <= 0.1
    assert run("evaluate", "--model", "OUT2", *SETS, "--out", "figures.json") == 0
    assert forget_probability("figures.json", "model") < 0.2


@pytest.mark.filterwarnings("ignore::UserWarning:transformers.quantizers")
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_quantized_model_forgets_and_is_measured_and_patched(kind, place, capsys):
    pytest.importorskip("bitsandbytes")
    assert run(*UNLEARN, "--out", "OUT", "--load-in", kind, *QUICK) == 0
    assert Path("OUT/deltas.safetensors").is_file()
    assert run("evaluate", "--model", "OUT", *SETS, "--reference", "MODEL_DIR", "--out", "figures.json") == 0
    assert forget_probability("figures.json", "model") <= 0.11
    assert run("attribute", "--model", "OUT", "--forget", "forget.jsonl", "--out", "attributed") == 0
    # Its deltas are a patch of the codes beside them.
    create = ("patch", "create", "BASE", "OUT", "OUT/selection.safetensors", "patch.safetensors")
    shutil.copytree("MODEL_DIR", "BASE")
    capsys.readouterr()
    assert run(*create) == 2
    told = "The base of deltas is the codes beside them: copy 'OUT', and remove deltas.safetensors from the copy."
    assert told in capsys.readouterr().err
    shutil.rmtree("BASE")
    shutil.copytree("OUT", "BASE")
    assert run(*create) == 2
    assert "The base 'BASE' holds deltas itself, expected no deltas." in capsys.readouterr().err
    Path("BASE/deltas.safetensors").unlink()
    assert run(*create) == 0
    assert run("patch", "show", "patch.safetensors") == 0
    assert "down_proj.delta  delta" in capsys.readouterr().out
    assert run("patch", "verify", "patch.safetensors", "BASE", "OUT") == 0
    assert run("patch", "verify", "patch.safetensors", "BASE", "BASE") == 1
    assert run("patch", "verify", "patch.safetensors", "MODEL_DIR", "MODEL_DIR") == 1
    assert run("patch", "apply", "patch.safetensors", "BASE", "applied") == 0
    assert Path("applied/deltas.safetensors").read_bytes() == Path("OUT/deltas.safetensors").read_bytes()
    assert content("applied") == content("OUT")
    assert run("evaluate", "--model", "applied", *SETS, "--out", "applied.json") == 0
    assert forget_probability("applied.json", "model") == forget_probability("figures.json", "model")
    for wrong in ("OUT", "MODEL_DIR"):
        assert run("patch", "apply", "patch.safetensors", wrong, "twice") == 2
    assert run("patch", "revert", "patch.safetensors", "BASE", "reverted") == 2
    assert run("patch", "revert", "patch.safetensors", "OUT", "reverted") == 0
    assert content("reverted") == content("BASE") and not Path("reverted/deltas.safetensors").exists()


@pytest.mark.parametrize("step", [0, 7, 25])
def test_a_run_that_is_interrupted_goes_on_to_the_same_bits(step, place, monkeypatch, capsys):
    assert run(*UNLEARN, "--out", "whole", *QUICK) == 0
    take = Stepper.take

    def interrupted(self: Stepper, number: int):
        if number == step:
            raise KeyboardInterrupt
        return take(self, number)

    monkeypatch.setattr(Stepper, "take", interrupted)
    assert run(*UNLEARN, "--out", "OUT", *QUICK) == 130
    assert not Path("OUT").exists() and Path("OUT.run").is_dir()
    monkeypatch.setattr(Stepper, "take", take)
    assert run(*UNLEARN, "--out", "OUT", *QUICK) == 0
    assert content("OUT") == content("whole")
    assert not Path("OUT.run").exists()
