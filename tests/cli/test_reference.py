"""Figures of a reference that were measured before serve as the model does; what is wrong is said before the work."""

from __future__ import annotations

import gc
import json
import sys
import weakref

import pytest
from transformers import AutoModelForCausalLM

from tests.cli.test_cli import assert_one_line, call, files, options, write  # noqa: F401 (a fixture)
from tests.unlearning.test_driver import RECIPE
from torch_simu.cli.loading import Loading
from torch_simu.unlearning.demo.demo import make_fiction

TOFU = {"forget": "forget", "retain": "retain", "real-authors": "world", "world-facts": "world"}


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    """The options of the suite TOFU, for rows with wrong answers."""
    folder, fiction = tmp_path_factory.mktemp("tofu"), make_fiction(RECIPE, seed=0)
    words = []
    for name, part in TOFU.items():
        rows = [
            {"question": row.question, "answer": row.answer, "perturbed_answer": ["a copper map", "a glass bell"]}
            for row in fiction.rows[part][:3]
        ]
        words += [f"--{name}", write(folder / f"{name}.jsonl", *rows)]
    return ["--suite", "tofu", "--max-new-tokens", 4, *words]


@pytest.fixture(scope="module")
def measured(files, tofu, tmp_path_factory):  # noqa: F811
    """What `evaluate --out` wrote of the model, without a suite and with one."""
    folder = tmp_path_factory.mktemp("measured")
    model = ("evaluate", "--model", files / "model")
    assert call(*model, *options(files, "forget", "retain")[2:], "--out", folder / "plain.json") == 0
    assert call(*model, *tofu, "--out", folder / "tofu.json") == 0
    return folder


@pytest.fixture
def unloaded(monkeypatch):
    """Let no model be loaded: what is refused is refused before."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def test_the_figures_of_a_file_stand_where_those_of_the_model_would(files, measured, tmp_path, capsys):  # noqa: F811
    job = ("evaluate", *options(files, "forget", "retain"))
    for name, reference in (("of_file", measured / "plain.json"), ("of_model", files / "model")):
        assert call(*job, "--reference", reference, "--out", tmp_path / name) == 0
    of_file, of_model = (json.loads((tmp_path / name).read_text()) for name in ("of_file", "of_model"))
    assert of_file == of_model and list(of_file["methods"]) == ["reference", "model"]
    assert capsys.readouterr().out.count("reference") >= 2


def test_one_model_is_in_memory_at_a_time(files, monkeypatch):  # noqa: F811
    alive, load = [], Loading.load

    def counted(self, *given, **options):
        gc.collect()
        assert not any(model() is not None for model in alive)
        found = load(self, *given, **options)
        alive.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(Loading, "load", counted)
    assert call("evaluate", *options(files, "forget", "retain"), "--reference", files / "model") == 0
    assert len(alive) == 2


def test_forget_quality_is_the_same_with_the_values_of_a_file(files, tofu, measured, tmp_path):  # noqa: F811
    job = ("evaluate", "--model", files / "model", *tofu)
    for name, reference in (("of_file", measured / "tofu.json"), ("of_model", files / "model")):
        assert call(*job, "--reference", reference, "--out", tmp_path / name) == 0
    of_file, of_model = (json.loads((tmp_path / name).read_text()) for name in ("of_file", "of_model"))
    assert of_file == of_model
    # The model beside itself: the two distributions are one.
    assert of_file["suites"]["model"]["forget_quality"] == {"geometric": 1.0, "arithmetic": 1.0}


def test_what_was_not_measured_has_neither_a_column_nor_a_place_in_the_file(files, measured, capsys):  # noqa: F811
    assert call("evaluate", *options(files, "forget", "retain"), "--reference", measured / "plain.json") == 0
    shown = capsys.readouterr().out
    assert "changed" not in shown and "state" not in shown and "0 B" not in shown
    content = json.loads((measured / "plain.json").read_text())
    assert set(content["methods"]["model"]) == {"forget", "retain"}


def edited(path, change, to):
    content = json.loads(path.read_text())
    change(content)
    to.write_text(json.dumps(content))
    return to


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("plain.json", lambda c: c["settings"]["sets"].update(forget="other.jsonl"), "was measured with sets"),
        ("plain.json", lambda c: c["settings"]["sets"].pop("retain"), "was measured with sets"),
        ("plain.json", lambda c: c["settings"]["rows"].update(forget=1), "was measured with rows"),
        ("plain.json", lambda c: c["settings"].update(max_length=7), "was measured with max_length 7, expected None"),
        ("plain.json", lambda c: c["methods"].pop("model"), "has no 'model'"),
        ("plain.json", lambda c: c["methods"]["model"].pop("retain"), "has no 'retain'"),
        ("plain.json", lambda c: c["methods"]["model"]["forget"].update(em=2), "em of forget in"),
        ("plain.json", lambda c: c["methods"]["model"]["forget"].pop("es"), "es of forget in"),
        ("plain.json", lambda c: c["methods"]["model"]["forget"].update(em=float("inf")), "neither a model nor JSON"),
        ("plain.json", lambda c: c.clear(), "has no 'settings'"),
        ("tofu.json", lambda c: None, "was measured with sets"),
    ],
)
@pytest.mark.usefixtures("unloaded")
def test_a_file_of_other_sets_or_without_figures_is_refused(
    files,  # noqa: F811
    measured,
    tmp_path,
    capsys,
    name,
    change,
    message,
):
    wrong = edited(measured / name, change, tmp_path / "wrong.json")
    assert call("evaluate", *options(files, "forget", "retain"), "--reference", wrong) == 2
    assert_one_line(capsys, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["settings"].update(suite="lume"), "was measured with suite 'lume', expected 'tofu'"),
        (lambda c: c["settings"].update(suite=None), "was measured with suite None, expected 'tofu'"),
        (lambda c: c["suites"].clear(), "has no 'model'"),
        (lambda c: c["suites"]["model"].pop("log_truth_ratios"), "none of log_truth_ratios (geometric), expected 3"),
        (lambda c: c["suites"]["model"]["log_truth_ratios"]["arithmetic"].pop(), "2 values of log_truth_ratios"),
        (lambda c: c["suites"]["model"]["log_truth_ratios"].update(geometric=["a"] * 3), "is 'a' of type str"),
    ],
)
@pytest.mark.usefixtures("unloaded")
def test_a_file_without_the_values_of_the_suite_is_refused(
    files,  # noqa: F811
    tofu,
    measured,
    tmp_path,
    capsys,
    change,
    message,
):
    wrong = edited(measured / "tofu.json", change, tmp_path / "wrong.json")
    assert call("evaluate", "--model", files / "model", *tofu, "--reference", wrong) == 2
    assert_one_line(capsys, message)


def test_a_file_that_moved_with_its_sets_is_taken(files, measured, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(files)
    sets = ("--forget", "forget.jsonl", "--retain", "./retain.jsonl")
    assert call("evaluate", "--model", "model", *sets, "--reference", measured / "plain.json") == 0


def test_the_result_does_not_replace_the_reference(files, measured, capsys):  # noqa: F811
    path = measured / "plain.json"
    before = path.read_bytes()
    job = ("evaluate", *options(files, "forget", "retain"), "--reference", path, "--out", path, "--force")
    assert call(*job) == 2
    assert_one_line(capsys, "is read")
    assert path.read_bytes() == before


@pytest.mark.usefixtures("unloaded")
def test_a_package_that_a_suite_needs_is_asked_for_before_a_model_is_loaded(
    files,  # noqa: F811
    tofu,
    measured,
    tmp_path,
    capsys,
    monkeypatch,
):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    model = ("evaluate", "--model", files / "model")
    for reference in (files / "model", measured / "tofu.json"):
        assert call(*model, *tofu, "--reference", reference) == 2
        assert_one_line(capsys, "The package 'scipy' is not installed")
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    assert call(*model, *tofu) == 2
    assert_one_line(capsys, "The package 'rouge-score' is not installed")
    lume = []
    for name in ("forget", "retain"):
        row = {"id": f"{name}qa0", "input": f"{name} ?", "output": "yes", "task": "Task1"}
        lume += [f"--{name}", write(tmp_path / f"{name}.jsonl", row)]
    assert call(*model, *lume, "--suite", "lume") == 2
    assert_one_line(capsys, "The package 'rouge-score' is not installed")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("evaluate", ["--suite", "tofu"], "real_authors"),
        ("evaluate", ["--suite", "lume"], "a task and an id"),
        ("evaluate", ["--reference", "./nothing"], "Model folder './nothing' does not exist"),
        ("evaluate", ["--device", "tpu"], "Device 'tpu' cannot be used"),
        ("unlearn", ["--layers", "["], "The pattern '[' is invalid"),
        ("unlearn", ["--betas", "1,0.9"], "betas[0] is 1.0"),
        ("unlearn", ["--scope", "row"], "scope is 'row', expected one of 'layer', 'global'"),
        ("attribute", ["--layers", "("], "The pattern '(' is invalid"),
        ("attribute", ["--rows", "0"], "attribution_rows is 0"),
    ],
)
@pytest.mark.usefixtures("unloaded")
def test_what_can_be_told_without_the_weights_is_told_before_they_are_read(
    files,  # noqa: F811
    tmp_path,
    capsys,
    command,
    words,
    message,
):
    sets = options(files, "forget", "retain")
    assert call(command, *sets, "--out", tmp_path / "out", *words) == 2
    assert_one_line(capsys, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("unloaded")
def test_a_model_that_is_not_there_is_missed_before_the_reference_is_measured(files, capsys):  # noqa: F811
    missing = options(files, "forget", "retain", model="./nothing")
    assert call("evaluate", *missing, "--reference", files / "model") == 2
    assert_one_line(capsys, "Model folder './nothing' does not exist")


def test_the_muse_suite_gives_its_figures_beside_a_reference_that_was_measured_before(files, tmp_path, capsys):  # noqa: F811
    fiction = make_fiction(RECIPE, seed=0)
    words = ["--model", files / "model", "--suite", "muse", "--max-new-tokens", 4]
    for name, part, kind in (("forget", "forget", "text"), ("retain", "retain", ""), ("unseen", "world", "text")):
        rows = [
            {"text": f"{row.question} {row.answer}"} if kind else {"question": row.question, "answer": row.answer}
            for row in fiction.rows[part][:3]
        ]
        words += [f"--{name}", write(tmp_path / f"muse_{name}.jsonl", *rows)]
    assert call("evaluate", *words, "--out", tmp_path / "muse.json") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("verbmem", "knowmem_retain", "min_k_auc"))
    assert "knowmem_forget" not in shown and "privleak" not in shown
    assert call("evaluate", *words, "--reference", tmp_path / "muse.json") == 0
    figures = json.loads((tmp_path / "muse.json").read_text())
    if figures["suites"]["model"]["min_k_auc"]:
        assert "privleak: 0" in capsys.readouterr().out
    del figures["suites"]["model"]["min_k_auc"]
    (tmp_path / "muse.json").write_text(json.dumps(figures))
    assert call("evaluate", *words, "--reference", tmp_path / "muse.json") == 2
    assert_one_line(capsys, "min_k_auc of the reference")
    assert call("evaluate", *options(files, "forget", "retain"), "--suite", "muse") == 2
    assert_one_line(capsys, "'unseen'")
