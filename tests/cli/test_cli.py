"""The command line does the whole job on files, and meets bad input with one line, status 2 and nothing written."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unlearning.test_driver import RECIPE, _memorized
from torch_simu import NeuronSelection
from torch_simu.attribution import Attribution
from torch_simu.cli.app import main
from torch_simu.cli.saving import exactness, save_scores
from torch_simu.unlearning.data.rows import load_rows
from torch_simu.unlearning.demo.demo import make_fiction

SETS = ("forget", "retain", "world")
NOT_REACHED = 3
"""Exit status of a run that ended above its forget target."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a memorized model and a file for each set."""
    folder = tmp_path_factory.mktemp("files")
    fiction = make_fiction(RECIPE, seed=0)
    model, _ = _memorized()
    copy.deepcopy(model).save_pretrained(folder / "model")
    fiction.tokenizer.save_pretrained(folder / "model")
    for name in SETS:
        rows = [{"question": row.question, "answer": row.answer} for row in fiction.rows[name]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def call(*arguments):
    """Run the command line and return its exit status."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def options(files, *names, **changed):
    sources = {"model": files / "model", **{name: files / f"{name}.jsonl" for name in SETS}, **changed}
    return [part for name in ("model", *names) for part in (f"--{name}", sources[name])]


def test_unlearn_writes_model_selection_log_plots_and_report(files, tmp_path, capsys, device):
    out = tmp_path / "out"
    quick = ["--device", device.type, "--lr", 1e-2, "--max-steps", 3, "--batch-size", 6, "--fraction", 0.3]
    assert call("unlearn", *options(files, "forget", "retain", "world"), "--out", out, *quick) == NOT_REACHED
    report = json.loads((out / "report.json").read_text())
    assert set(report) >= {"seed", "versions", "methods"} and set(report["methods"]) == {"before", "simu"}
    row = report["methods"]["simu"]
    assert set(row) == {*SETS, "changed_share", "optimizer_bytes", "seconds", "steps"} and row["steps"] == 3
    assert {key: value for key, value in report["methods"]["before"].items() if key not in SETS} == {
        **{"changed_share": 0.0, "optimizer_bytes": 0, "seconds": 0.0, "steps": 0}
    }
    assert set(row["forget"]) == {"em", "es", "probability", "qa_exact_match"}
    assert len((out / "steps.jsonl").read_text().splitlines()) == 3
    assert all((out / name).read_bytes()[1:4] == b"PNG" for name in ("forgetting.png", "attribution.png"))
    selection = NeuronSelection.load(out / "selection.safetensors")
    base, changed = (AutoModelForCausalLM.from_pretrained(folder) for folder in (files / "model", out))
    for (name, before), after in zip(base.named_parameters(), changed.parameters(), strict=True):
        off = ~selection.mask(layer) if (layer := name.removesuffix(".weight")) in selection else slice(None)
        assert torch.equal(before[..., off], after[..., off])
    assert "| simu |" in (out / "report.md").read_text() and "simu " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.key"]


def test_an_objective_that_refuses_gets_refusals_from_the_tokenizer(files, tmp_path):
    quick = ["--method", "all_neurons", "--objective", "idk", "--max-steps", 2]
    assert call("unlearn", *options(files, "forget", "retain"), "--out", tmp_path / "out", *quick) == NOT_REACHED
    losses = [json.loads(line)["forget_loss"] for line in (tmp_path / "out" / "steps.jsonl").read_text().splitlines()]
    assert losses[1] < losses[0]


def test_attribute_writes_scores_selection_and_a_heat_map(files, tmp_path, capsys, device):
    out = tmp_path / "out"
    where = ["--out", out, "--device", device.type]
    assert call("attribute", *options(files, "forget"), *where, "--steps", 10, "--fraction", 0.25) == 0
    attribution = Attribution.load(out / "attribution.safetensors")
    assert NeuronSelection.load(out / "selection.safetensors") == attribution.top(0.25)
    assert (out / "attribution.png").stat().st_size > 1000
    layers = json.loads((out / "attribution.json").read_text())["layers"]
    assert {name: layer["incompleteness"] for name, layer in layers.items()} == attribution.incompleteness
    assert {name: layer["sum"] for name, layer in layers.items()} == pytest.approx(
        {name: score.sum().item() for name, score in attribution.scores.items()}
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert f"miss at most {max(attribution.incompleteness.values()):.1%} of the change that they explain" in shown


def test_attribute_within_a_budget_says_what_it_sufficed_for(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("attribute", *options(files, "forget"), "--out", out, "--budget", 2, "--fraction", 0.25) == 0
    attribution = Attribution.load(out / "attribution.safetensors")
    assert attribution.provenance["budget"] == "2" and not attribution.incompleteness
    layers = json.loads((out / "attribution.json").read_text())["layers"]
    assert all(layer.keys() == {"selected", "num_neurons", "largest_score", "sum"} for layer in layers.values())
    shown = " ".join(capsys.readouterr().out.split())
    assert "was not measured: the budget sufficed for one path point" in shown


def test_an_estimate_is_written_with_its_standard_errors_and_says_what_its_halves_share(tmp_path):
    scores = {"mlp": torch.tensor([4.0, 3.0, 2.0, 1.0]).double()}
    parts = {
        "standard_error": {"mlp": torch.full((4,), 0.5)},
        "difference": {"mlp": torch.tensor([0.0, 1.5, -1.5, 0.0])},
    }
    attribution = Attribution(scores, {}, 1, {}, **parts)
    save_scores(attribution.top(0.5), attribution, tmp_path)
    layer = json.loads((tmp_path / "attribution.json").read_text())["layers"]["mlp"]
    assert layer["standard_error"] == 1.0 and "incompleteness" not in layer
    # One half names the first two, the other one the first and the third.
    assert "each half of it names 50% of the top 50% of neurons that the other" in exactness(attribution, 0.5)
    assert exactness(attribution, 1.0) == "The scores are an estimate."


def test_scores_that_miss_too_much_are_refused_unless_asked(files, tmp_path, capsys):
    job = ("attribute", *options(files, "forget"), "--out", tmp_path / "out", "--steps", 1)
    assert call(*job) == 2
    assert_one_line(capsys, "of the change that they explain")
    assert call(*job, "--max-completeness-error", 10) == 0


def test_evaluate_prints_and_writes_both_models(files, tmp_path, capsys):
    out = tmp_path / "figures.json"
    reference = ["--reference", files / "model"]
    assert call("evaluate", *options(files, "forget", "retain"), *reference, "--out", out) == 0
    methods = json.loads(out.read_text())["methods"]
    assert methods["reference"]["forget"] == methods["model"]["forget"]
    assert "reference" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["evaluate", "attribute"])
def test_the_first_row_is_shown_once_with_its_scored_part_marked(files, tmp_path, capsys, command):
    rows = options(files, "forget", "retain")
    reference = ["--reference", files / "model"] if command == "evaluate" else ["--steps", 10]
    assert call(command, *rows, *reference, "--out", tmp_path / "out") == 0
    row = load_rows(files / "forget.jsonl")[0]
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("First row to forget") == 1
    prompt, scored = shown.split(">>> and <<<:")[1].split("<<<")[0].split(">>>")
    assert row.question.split()[0] in prompt and row.answer.split()[0] in scored


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_the_tofu_and_lume_suites_give_their_figures(files, tmp_path, capsys):
    fiction = make_fiction(RECIPE, seed=0)
    tofu = {}
    for name, part in {"forget": "forget", "retain": "retain", "real-authors": "world", "world-facts": "world"}.items():
        rows = [
            {"question": row.question, "answer": row.answer, "perturbed_answer": ["a copper map", "a glass bell"]}
            for row in fiction.rows[part][:3]
        ]
        tofu[name] = write(tmp_path / f"{name}.jsonl", *rows)
    sets = [part for name, path in tofu.items() for part in (f"--{name}", path)]
    model = ["--model", files / "model", "--max-new-tokens", 4]
    assert call("evaluate", *model, "--reference", files / "model", *sets, "--suite", "tofu") == 0
    assert "model_utility (geometric)" in (shown := capsys.readouterr().out) and "forget_quality" in shown
    lume = []
    for name in ("forget", "retain"):
        rows = [
            {"id": f"{name}{kind}", "input": row.question, "output": row.answer, "task": "Task1"}
            for row, kind in zip(fiction.rows[name], ("sc1", "qa0"), strict=False)
        ]
        lume += [f"--{name}", write(tmp_path / f"lume_{name}.jsonl", *rows)]
    assert call("evaluate", *model, *lume, "--suite", "lume") == 0
    assert "task_aggregate" in capsys.readouterr().out


GOOD = {"question": "Who?", "answer": "Ada"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "bad.jsonl"),
        ([GOOD, '{"question": "Wh\n'], "bad.jsonl:2"),
        ([{"frage": "Wer?", "antwort": "Ada"}], "question/answer or prompt/response or input/output"),
        ([], "bad.jsonl"),
        ([{"question": "Who?", "answer": ""}], "bad.jsonl:1: the answer is empty"),
    ],
)
def test_bad_rows_get_one_line_with_their_place(files, tmp_path, capsys, rows, message):
    bad = tmp_path / "bad.jsonl"
    if rows is not None:
        write(bad, *rows)
    assert call("unlearn", *options(files, "forget", "retain", forget=bad), "--out", tmp_path / "out") == 2
    assert_one_line(capsys, message)
    assert {path.name for path in tmp_path.iterdir()} <= {"bad.jsonl"}


def assert_one_line(capsys, message):
    error = capsys.readouterr().err
    assert error.startswith("torch-simu: ") and error.count("\n") == 1 and "Traceback" not in error
    assert message in error


def test_rows_in_both_sets_are_refused(files, tmp_path, capsys):
    both = options(files, "forget", "retain", retain=files / "forget.jsonl")
    assert call("unlearn", *both, "--out", tmp_path / "out") == 2
    assert_one_line(capsys, "in both the forget and the retain set")


def test_a_folder_without_model_or_tokenizer_is_refused(files, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(files / "model").save_pretrained(bare)
    capsys.readouterr()
    for model, message in (
        (tmp_path / "empty", "holds no config.json"),
        (bare, "tokenizer"),
        ("./no", "does not exist"),
    ):
        assert call("unlearn", *options(files, "forget", "retain", model=model), "--out", tmp_path / "out") == 2
        assert_one_line(capsys, message)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(files, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path / "small")
    make_fiction(RECIPE, seed=0).tokenizer.save_pretrained(tmp_path / "small")
    capsys.readouterr()
    assert call("attribute", *options(files, "forget", model=tmp_path / "small"), "--out", tmp_path / "out") == 2
    assert_one_line(capsys, "beyond the model's 50 embeddings")


def test_an_output_folder_is_replaced_by_force_only(files, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    job = ("attribute", *options(files, "forget"), "--out", out, "--steps", 10)
    assert call(*job) == 2
    assert_one_line(capsys, "Use --force")
    assert (out / "precious.txt").read_text() == "mine"
    assert call(*job, "--force") == 2
    assert_one_line(capsys, "holds something else than a result of torch-simu")
    (out / "precious.txt").rename(tmp_path / "precious.txt")
    assert call(*job) == 0
    assert call(*job, "--force") == 0
    assert (out / "selection.safetensors").exists()


def test_a_loss_that_is_not_finite_writes_nothing(files, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    make_fiction(RECIPE, seed=0).tokenizer.save_pretrained(tmp_path / "broken")
    capsys.readouterr()
    job = ["unlearn", *options(files, "forget", "retain", model=tmp_path / "broken"), "--out", tmp_path / "out"]
    assert call(*job, "--method", "all_neurons") == 2
    assert_one_line(capsys, "finite")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "-1"], "lr is -1.0"),
        (["--method", "soul"], "method is 'soul', expected one of"),
        (["--max-steps", "many"], "--max-steps"),
        (["--device", "tpu"], "Device 'tpu' cannot be used"),
        (["--dtype", "int3"], "dtype is 'int3', expected one of 'auto'"),
        (["--frobnicate"], "--frobnicate"),
        (["--layers", "mlp.nothing"], "mlp.nothing"),
    ],
)
def test_bad_options_get_one_line(files, tmp_path, capsys, arguments, message):
    assert call("unlearn", *options(files, "forget", "retain"), "--out", tmp_path / "out", *arguments) == 2
    assert_one_line(capsys, message)
    assert not (tmp_path / "out").exists()


def test_a_missing_option_and_an_incomplete_suite_are_named(files, tmp_path, capsys):
    assert call("unlearn", "--model", files / "model") == 2
    assert_one_line(capsys, "--forget")
    assert call("evaluate", *options(files, "forget", "retain"), "--suite", "tofu") == 2
    assert_one_line(capsys, "real_authors")
    assert call("evaluate", *options(files, "forget", "retain"), "--suite", "rwku") == 2
    assert_one_line(capsys, "suite is 'rwku', expected one of 'tofu', 'lume', 'muse'")
    contrast = ("attribute", *options(files, "forget"), "--rule", "contrast", "--out", tmp_path / "out")
    assert call(*contrast) == 2
    assert_one_line(capsys, "without a retain set")


def test_help_is_no_error(capsys):
    assert call("--help") == 0
    assert "unlearn" in capsys.readouterr().out
