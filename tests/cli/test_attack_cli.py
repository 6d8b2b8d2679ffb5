"""`torch-simu attack`, and `--attack` of evaluate and unlearn, say what comes back of rows that were not taught."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from tests.cli.test_cli import GOOD, NOT_REACHED, assert_one_line, call, files, options, write  # noqa: F401 (a fixture)
from tests.unlearning.test_driver import RECIPE
from torch_simu.unlearning.attack.config import ATTACKS
from torch_simu.unlearning.demo.demo import make_fiction

QUICK = ("--rates", "1e-3,1e-2", "--steps", 4, "--interval", 2)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A model of the same shape that never saw a row."""
    from torch_simu.unlearning.demo.demo import make_model

    folder, tokenizer = tmp_path_factory.mktemp("stranger") / "model", make_fiction(RECIPE, seed=0).tokenizer
    make_model(RECIPE, len(tokenizer), seed=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_command_shows_and_writes_every_attack_on_both_models(files, stranger, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "attack.json"
    text = write(tmp_path / "text.jsonl", {"text": "Where is the old map ?"})
    sets = [*options(files, "forget", "retain"), "--text", text]
    assert call("attack", *sets, "--reference", stranger, *QUICK, "--out", out) == 0
    content = json.loads(out.read_text())
    assert list(content["methods"]) == list(content["attacks"]) == ["model", "reference"]
    for name, method in content["methods"].items():
        assert list(method["attack"]) == list(ATTACKS)
        for attack, figures in method["attack"].items():
            made = content["attacks"][name][attack]
            assert figures == {key: max(point[key] for point in made["trace"]) for key in ("probability", "es")}
            assert made["before"] == method["scored"]
    relearn = content["attacks"]["model"]["relearn"]
    assert [(point["rate"], point["step"]) for point in relearn["trace"]] == [
        *((1e-3, 2), (1e-3, 4)),
        *((1e-2, 2), (1e-2, 4)),
    ]
    assert (relearn["rows_taught"], relearn["rows_scored"]) == (6, 10)
    known, floor = (content["methods"][name]["attack"]["relearn"]["probability"] for name in ("model", "reference"))
    assert known > 0.9 and floor < 0.5
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.split(" ")[0] in ATTACKS]
    assert [line.split(" ")[0] for line in table] == list(ATTACKS) and max(map(len, table)) <= 80
    said = " ".join(" ".join(lines).split())
    assert f"Relearning 6 rows brings the other 10 back to a probability of {known:.3f}" in said
    assert f"reference: {floor:.3f})." in said


def test_the_model_on_disk_is_only_read(files, tmp_path):  # noqa: F811
    before = {path.name: path.read_bytes() for path in (files / "model").iterdir()}
    assert call("attack", *options(files, "forget"), "--attacks", "relearn, few_shots", *QUICK) == 0
    assert {path.name: path.read_bytes() for path in (files / "model").iterdir()} == before


def test_the_same_seed_writes_the_same_file(files, tmp_path):  # noqa: F811
    for number in range(2):
        job = ("attack", *options(files, "forget"), *QUICK, "--attacks", "relearn", "--seed", 3)
        assert call(*job, "--out", tmp_path / f"{number}.json") == 0
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()


def test_evaluate_attacks_both_models_and_says_it_of_the_model(files, stranger, tmp_path, capsys):  # noqa: F811
    out, reference = tmp_path / "figures.json", tmp_path / "reference.json"
    sets = options(files, "forget", "retain")
    assert call("evaluate", *options(files, "forget", "retain", model=stranger), "--attack", "--out", reference) == 0
    capsys.readouterr()
    assert call("evaluate", *sets, "--attack", "--reference", stranger, "--out", out) == 0
    said = " ".join(capsys.readouterr().out.split())
    content = json.loads(out.read_text())
    back = {name: method["attack"]["relearn"]["probability"] for name, method in content["methods"].items()}
    assert back["model"] > 0.9 > 0.5 > back["reference"]
    assert set(content["methods"]["model"]["attack"]) == set(ATTACKS) - {"fine_tune_text"}
    assert set(content["methods"]["model"]["attack"]["relearn"]) == {"probability", "es"}
    assert f"probability of {back['model']:.3f}" in said and f"reference: {back['reference']:.3f})" in said
    # The figures of a file stand where those of the model would.
    assert call("evaluate", *sets, "--attack", "--reference", reference, "--out", tmp_path / "of_file.json") == 0
    assert json.loads((tmp_path / "of_file.json").read_text()) == content
    # What was attacked was measured without, too; what was not attacked has no figures to compare with.
    assert call("evaluate", *sets, "--reference", reference, "--out", tmp_path / "plain.json") == 0
    assert "attack" not in json.loads((tmp_path / "plain.json").read_text())["methods"]["model"]
    capsys.readouterr()
    assert call("evaluate", *sets, "--out", tmp_path / "without.json") == 0
    capsys.readouterr()
    assert call("evaluate", *sets, "--attack", "--reference", tmp_path / "without.json") == 2
    assert_one_line(capsys, "was measured with attack None")
    damaged = json.loads(reference.read_text())
    damaged["methods"]["model"]["attack"]["relearn"]["es"] = 7
    reference.write_text(json.dumps(damaged))
    assert call("evaluate", *sets, "--attack", "--reference", reference) == 2
    assert_one_line(capsys, "es of the attack relearn")


def test_unlearn_attacks_before_and_after_and_writes_it_into_both_reports(files, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    quick = ["--method", "fo_graddiff", "--lr", 1e-2, "--max-steps", 3, "--batch-size", 6, "--attack"]
    assert call("unlearn", *options(files, "forget", "retain"), "--out", out, *quick) in (0, NOT_REACHED)
    methods = json.loads((out / "report.json").read_text())["methods"]
    assert [set(method["attack"]) for method in methods.values()] == [set(ATTACKS) - {"fine_tune_text"}] * 2
    back = methods["fo_graddiff"]["attack"]["relearn"]["probability"]
    page = (out / "report.md").read_text()
    assert f"probability of {back:.3f}" in page and "| method | relearn | relearn_low_rank | fine_tune |" in page
    assert f"| fo_graddiff | {back:.3f} / " in page
    said = " ".join(capsys.readouterr().out.split())
    assert f"Relearning 6 rows brings the other 10 back to a probability of {back:.3f}" in said
    # What is written is not what an attack left behind.
    AutoModelForCausalLM.from_pretrained(out)
    assert call("evaluate", *options(files, "forget", "retain", model=out), "--out", tmp_path / "after.json") == 0
    measured = json.loads((tmp_path / "after.json").read_text())["methods"]["model"]
    assert measured["forget"]["probability"] == pytest.approx(methods["fo_graddiff"]["forget"]["probability"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rates", "0"), "rates[0] is 0.0, expected a finite number in (0, inf)"),
        (("--rates", "fast"), "rates is 'fast', expected numbers, 1e-5,1e-4 say"),
        (("--rates", ""), "rates is '', expected numbers"),
        (("--steps", 0), "steps is 0"),
        (("--interval", -1), "interval is -1"),
        (("--attacks", "relern"), "attack is 'relern', expected one of"),
        (("--attacks", "fine_tune"), "The attack 'fine_tune' has no retain rows"),
        (("--out", "/nothing/attack.json"), "does not exist"),
        (("--reference", "./nothing"), "does not exist"),
    ],
)
def test_what_is_wrong_gets_one_line_before_a_model_is_loaded(
    files,  # noqa: F811
    words,
    message,
    capsys,
    monkeypatch,
):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    assert call("attack", *options(files, "forget"), *words) == 2
    assert_one_line(capsys, message)


@pytest.mark.parametrize("command", [("attack",), ("evaluate", "--attack"), ("unlearn", "--attack", "--out", "o")])
def test_one_row_is_no_set_to_attack_and_is_said_before_a_model_is_loaded(
    command,
    files,  # noqa: F811
    tmp_path,
    capsys,
    monkeypatch,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(AutoModelForCausalLM, "from_pretrained")
    one = write(tmp_path / "one.jsonl", GOOD, GOOD)
    assert call(*command, *options(files, "forget", "retain", forget=one)) == 2
    assert_one_line(capsys, "The forget set has")


def test_a_file_is_replaced_by_force_only(files, tmp_path, capsys):  # noqa: F811
    out = write(tmp_path / "attack.json", "mine")
    job = ("attack", *options(files, "forget"), "--attacks", "round_8bit", "--out", out)
    assert call(*job) == 2
    assert_one_line(capsys, "Use --force")
    assert out.read_text() == "mine"
    assert call(*job, "--force") == 0 and json.loads(out.read_text())["methods"]


def test_a_quantized_model_is_attacked_through_its_deltas_and_says_what_was_skipped(files, tmp_path, capsys):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    quick = ["--load-in", "8bit", "--max-steps", 2, "--batch-size", 6, "--attack"]
    assert call("unlearn", *options(files, "forget", "retain"), "--out", out, *quick) in (0, NOT_REACHED)
    methods = json.loads((out / "report.json").read_text())["methods"]
    assert [set(method["attack"]) for method in methods.values()] == [
        {"relearn", "relearn_low_rank", "fine_tune", "few_shots"}
    ] * 2
    assert "The attack round_8bit was skipped: its weights are codes already." in (out / "report.md").read_text()
    # The folder is attacked as it was written.
    found = tmp_path / "attack.json"
    job = ("attack", *options(files, "forget", model=out), "--attacks", "relearn", "--batch-size", 6)
    assert call(*job, "--out", found) == 0
    (changed,) = (row for name, row in methods.items() if name != "before")
    again = json.loads(found.read_text())["methods"]["model"]["attack"]["relearn"]
    assert again == pytest.approx(changed["attack"]["relearn"], abs=1e-3)
