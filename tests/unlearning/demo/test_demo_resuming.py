"""A demo that was stopped goes on after the models that are finished, to the numbers of one that was not."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.killing import child
from tests.unlearning.demo.tiny import TINY, signaled, tiny_command
from torch_simu.cli.app import main
from torch_simu.unlearning.config import METHODS
from torch_simu.unlearning.demo import attacked, demo
from torch_simu.unlearning.demo.demo import DemoResult, run_demo
from torch_simu.unlearning.report.runs import how_to_go_on

FEW = ("simu_graddiff", "fo_graddiff")
NAMES = ("before", *FEW, "retrained")


class Stop(BaseException):
    """What stops a demo, and is no error."""


def found(result: DemoResult) -> dict[str, object]:
    """What a demo found, without wall times."""
    content = result.report.to_json()
    rows = {name: {key: row[key] for key in row if key != "seconds"} for name, row in content["methods"].items()}
    scores = {name: values.tolist() for name, values in result.attribution.scores.items()}
    return {**content, "methods": rows, "logs": dict(result.logs), "scores": scores, "start": dict(result.start)}


def tiny(folder: Path | None = None, seed: int = 0, **told: object) -> DemoResult:
    """A demo of two methods."""
    return run_demo(seed, recipe=TINY, methods=FEW, checkpoint=folder, **told)


@pytest.fixture(scope="module")
def whole() -> dict[str, object]:
    """What a demo finds that is not stopped."""
    return found(tiny())


def stopped(folder: Path, at: str) -> None:
    """Run a demo until it tells a stage of this name."""

    def stop(stage: str, *told: object) -> None:
        if stage == at:
            raise Stop

    with pytest.raises(Stop):
        tiny(folder, progress=stop)


@pytest.mark.parametrize(
    ("at", "finished"),
    [
        ("before: train", None),
        ("before: attack relearn", 0),
        ("simu_graddiff: attack relearn", 1),
        ("fo_graddiff: unlearn", 2),
        ("retrained: attack relearn", 3),
    ],
)
def test_a_demo_stopped_at_any_model_goes_on_after_those_that_are_finished_to_the_same_numbers(
    at: str, finished: int | None, whole: dict[str, object], tmp_path: Path
) -> None:
    stopped(tmp_path / "run", at)
    if finished is None:
        assert list(tmp_path.iterdir()) == []
    shown, stages = [], set()
    result = tiny(
        tmp_path / "run",
        progress=lambda stage, *told: stages.add(stage.split(":")[0]),
        finished=lambda name, row: shown.append((name, row.to_json())),
    )
    assert found(result) == whole
    # Each is shown, and what was finished is not made again.
    assert shown == list(result.report.to_json()["methods"].items())
    assert stages == set(NAMES[finished or 0 :])
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(rows["methods"].items()) == shown and rows["settings"] == json.loads(json.dumps(TINY.to_json()))


def test_a_model_that_was_taught_is_not_taught_again(whole: dict[str, object], tmp_path: Path) -> None:
    stopped(tmp_path / "run", "before: attack relearn")
    assert how_to_go_on(tmp_path / "run") == "Call the same command again to go on after the teaching."
    stages = []
    assert found(tiny(tmp_path / "run", progress=lambda stage, *told: stages.append(stage))) == whole
    assert stages[0] == "before: attack relearn" and "before: train" not in stages


def test_each_row_is_in_the_file_before_it_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "run" / "results.json"

    def look(name: str, row: object) -> None:
        content = json.loads(path.read_text())["methods"]
        assert list(content) == list(NAMES[: NAMES.index(name) + 1]) and content[name] == row.to_json()

    tiny(path.parent, finished=look)
    assert how_to_go_on(path.parent).endswith(f"to go on after 4 finished models ({', '.join(NAMES)}).")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo that was stopped after its first method."""
    folder = tmp_path_factory.mktemp("half") / "run"
    stopped(folder, "fo_graddiff: unlearn")
    return folder


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "with seed 0, expected seed 1."),
        ({"recipe": {"d_ff": 24, "num_places": 3}}, "with num_places 2, d_ff 16, expected num_places 3, d_ff 24."),
        ({"version": "0"}, r"with torch-simu '[^']+', torch '[^']+', transformers '[^']+', expected torch-simu '0', "),
    ],
)
def test_another_demo_is_refused_with_what_differs_and_harms_nothing(
    change: dict[str, object], told: str, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(half, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    if "version" in change:
        monkeypatch.setattr("torch_simu.unlearning.report.report.package_version", lambda name: change["version"])
    recipe = dataclasses.replace(TINY, **change.get("recipe", {}))
    with pytest.raises(ValueError, match=f"Folder '.*run' holds an unfinished demo {told}") as error:
        run_demo(change.get("seed", 0), recipe=recipe, methods=FEW, checkpoint=tmp_path / "run")
    assert str(error.value).endswith("give another --out, or remove that folder to start anew.")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_demo_that_finished_nothing_is_in_nobodys_way(tmp_path: Path) -> None:
    stopped(tmp_path / "run", "before: attack relearn")
    # As a kill leaves it that comes before anything else is written.
    (tmp_path / "run" / "taught_before.safetensors").rename(tmp_path / "run" / ".results.json.x.torch-simu")
    result = run_demo(1, recipe=TINY, methods=(), checkpoint=tmp_path / "run")
    assert result.report.seed == 1 == json.loads((tmp_path / "run" / "results.json").read_text())["seed"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", b"{"),
        ("results.json", b"[]"),
        ("results.json", b'{"methods": 1}'),
        ("steps_simu_graddiff.jsonl", b"{"),
        ("taught_before.safetensors", b""),
        ("attribution_simu_graddiff.safetensors", b""),
    ],
)
def test_a_damaged_file_is_refused_in_one_line_that_names_it(
    name: str, content: bytes, half: Path, tmp_path: Path
) -> None:
    shutil.copytree(half, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        tiny(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no unfinished demo"):
        tiny(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("seed", "methods", "told"), [(-1, FEW, "seed is -1"), (0, ("soul",), "method is 'soul'")])
def test_what_is_out_of_bounds_is_refused_before_anything_is_made(
    seed: int, methods: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        run_demo(seed, recipe=TINY, methods=methods, checkpoint=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def command(place: Path, *options: str, at: str = "", number: signal.Signals = signal.SIGINT) -> Callable[[], None]:
    """The command, which gets a signal at a stage."""

    def work() -> None:
        # Tests in the background of a shell inherit that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with tiny_command(), signaled(at, number):
            main(["demo", "--out", str(place / "out"), *options])

    return work


def timeless(folder: Path) -> dict[str, bytes]:
    """The files of a result, and what they hold but wall times, which only reports hold."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in [name for name in files if name.startswith("report.")]:
        pattern = rb"(?<=\"seconds\": )[\d.]+|[\d.]+ (?=\|\n)|(?<=<td>)[\d.]+(?=</td></tr>)"
        files[name] = re.sub(pattern, b"", files[name])
    return files


def test_the_command_killed_then_interrupted_then_called_again_ends_with_the_same_bytes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, other = tmp_path / "place", tmp_path / "other"
    for each in (place, other):
        each.mkdir()
    for name in ("plot_curves", "plot_attribution"):
        monkeypatch.setattr(demo, name, lambda *arguments, **options: arguments[1].write_bytes(b"plot"))
    monkeypatch.setattr(attacked, "plot_attack", lambda *arguments, **options: arguments[1].write_bytes(b"plot"))
    killed, _ = child(command(place, at="fo_graddiff: measure", number=signal.SIGKILL), place)
    assert killed == -signal.SIGKILL and not (place / "out").exists()
    assert list(json.loads((place / "out.run" / "results.json").read_text())["methods"]) == ["before", "simu"]
    capfd.readouterr()
    assert child(command(place, at="random_neurons: unlearn"), place)[0] == 1
    shown, errors = capfd.readouterr()
    rows = [line.split()[0] for line in shown.splitlines() if line[:1].strip() and "%" in line]
    assert rows == ["before", "simu", "fo_graddiff", "so_graddiff", "simu_graddiff"]
    assert "2 of 9 models are finished; the others take less than a minute here." in " ".join(shown.split())
    told = "torch-simu: Interrupted. Call the same command again to go on after 5 finished models (before, simu, "
    assert errors.splitlines()[-1] == f"{told}fo_graddiff, so_graddiff, simu_graddiff)."
    # Another one is refused before it says anything of that one.
    assert child(command(place, "--seed", "1"), place)[0] == 1
    shown, errors = capfd.readouterr()
    assert shown == "" and "holds an unfinished demo with seed 0, expected seed 1." in errors
    assert sorted(path.name for path in place.iterdir()) == ["out.run"]
    assert child(command(place), place)[0] == child(command(other), other)[0] == 0
    assert [path.name for path in place.iterdir()] == ["out"]
    assert timeless(place / "out") == timeless(other / "out")
    assert list(json.loads((place / "out" / "report.json").read_text())["methods"]) == ["before", *METHODS, "retrained"]
    # A finished demo is treated as any other result: kept, unless --force says otherwise.
    capfd.readouterr()
    before = {path.name: path.stat().st_mtime_ns for path in (place / "out").iterdir()}
    assert child(command(place), place)[0] == 1
    assert "exists and is not empty, expected a new folder. Use --force to replace it." in capfd.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in (place / "out").iterdir()} == before
    assert child(command(place, "--force", at="simu: measure"), place)[0] == 1
    # The old one stays until the new one is complete.
    assert {path.name: path.stat().st_mtime_ns for path in (place / "out").iterdir()} == before
    assert child(command(place, "--force"), place)[0] == 0
    assert timeless(place / "out") == timeless(other / "out") and [path.name for path in place.iterdir()] == ["out"]
