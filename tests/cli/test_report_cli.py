"""The report of unlearn names data, model and change by hash, and says beside a reference how much is forgotten."""

from __future__ import annotations

import copy
import json
import stat

import pytest
from transformers import AutoModelForCausalLM

from tests.cli.test_attack_cli import stranger  # noqa: F401 (a fixture)
from tests.cli.test_cli import NOT_REACHED, assert_one_line, call, files, options, write  # noqa: F401 (a fixture)
from tests.unlearning.report.test_pages import Page
from torch_simu._hashes import sha256_of_hashes
from torch_simu.cli.loading import load_model
from torch_simu.cli.recording import tensor_hashes
from torch_simu.unlearning.data.rows import load_rows
from torch_simu.unlearning.report.keyed import keyed_hash, read_key

QUICK = ["--max-steps", 2, "--batch-size", 8]


def unlearned(files, out, *words, sets=("forget", "retain"), **changed):  # noqa: F811
    assert call("unlearn", *options(files, *sets, **changed), "--out", out, *QUICK, *words) in (0, NOT_REACHED)
    return json.loads((out / "report.json").read_text())["summary"]


@pytest.fixture(scope="module")
def planted(files, tmp_path_factory):  # noqa: F811
    """A result for rows with strings that occur nowhere else, and what it says."""
    folder = tmp_path_factory.mktemp("planted")
    for name in ("forget", "retain", "world", "unseen"):
        rows = load_rows(files / f"{name if name != 'unseen' else 'world'}.jsonl")[:4]
        texts = [
            (f"{row.question} {name}xq{number}", f"{name}xa{number} {row.answer}") for number, row in enumerate(rows)
        ]
        write(folder / f"{name}.jsonl", *({"question": question, "answer": answer} for question, answer in texts))
    sets = {name: folder / f"{name}.jsonl" for name in ("forget", "retain", "world")}
    words = ["--unseen", folder / "unseen.jsonl", "--attack"]
    return folder, unlearned(files, folder / "out", *words, sets=tuple(sets), **sets)


def test_no_text_of_a_row_is_in_any_file_of_the_report(planted):
    folder, _ = planted
    names = {path.name for path in (folder / "out").iterdir()}
    assert names >= {"report.json", "report.md", "report.html", "steps.jsonl", "forgetting.png"}
    for path in [*(folder / "out").iterdir(), folder / "out.key"]:
        for name in ("forget", "retain", "world", "unseen"):
            assert f"{name}xq".encode() not in path.read_bytes() and f"{name}xa".encode() not in path.read_bytes()


def test_the_hashes_are_those_of_rows_and_weights(planted, files):  # noqa: F811
    folder, summary = planted
    key = read_key(folder / "out.key")
    assert stat.S_IMODE((folder / "out.key").stat().st_mode) == 0o600 and summary["key_file"] == "out.key"
    for name, each in summary["sets"].items():
        assert each["hmac_sha256"] == keyed_hash(load_rows(folder / f"{name}.jsonl"), key)
        assert (each["file"], each["rows"]) == (f"{name}.jsonl", 4)
    before, after = (tensor_hashes(load_model(str(place))[0]) for place in (files / "model", folder / "out"))
    changed = summary["changed"]
    assert summary["model"] == {"name": "model", "sha256": sha256_of_hashes(before)}
    assert changed["sha256"] == sha256_of_hashes(after)
    assert changed["unchanged"] == {name: before[name] for name in before if before[name] == after[name]}
    assert changed["changed"].keys() == {name for name in before if before[name] != after[name]} != set()
    assert all(name.endswith("mlp.down_proj.weight") for name in changed["changed"])


def test_membership_and_attacks_are_measured_where_they_were_asked_for(planted):
    folder, summary = planted
    content = json.loads((folder / "out" / "report.json").read_text())
    assert set(summary["forgotten"]["membership"]) == {"before", "after"}
    assert content["methods"]["simu"]["membership"] == summary["forgotten"]["membership"]["after"]
    assert "unseen" not in content["methods"]["simu"] and "unseen" not in summary["cost"]["sets"]
    relearn = summary["forgotten"]["attacks"]["relearn"]
    assert relearn["probability"]["after"] == content["methods"]["simu"]["attack"]["relearn"]["probability"]
    assert relearn["rows_taught"] + relearn["rows_scored"] == 4
    assert not [rule["rule"] for rule in summary["verdict"]["rules"] if rule["met"] is None]


def test_the_page_of_a_run_is_whole_and_holds_its_plots(planted):
    folder, _ = planted
    page = Page((folder / "out" / "report.html").read_text())
    assert "svg" in page.elements and "script" not in page.elements
    assert "Verdict" in page.text and "forget.jsonl" in page.text


def test_a_reference_sets_the_limits_and_its_file_stands_for_it(files, stranger, tmp_path, capsys):  # noqa: F811
    figures = tmp_path / "reference.json"
    assert call("evaluate", *options(files, "forget", "retain", model=stranger), "--out", figures) == 0
    found = [
        unlearned(files, tmp_path / f"out{number}", "--reference", each, sets=("forget", "retain", "world"))
        for number, each in enumerate((stranger, figures))
    ]
    measured = json.loads(figures.read_text())["methods"]["model"]["forget"]
    for number, summary in enumerate(found):
        assert summary["forgotten"]["measures"]["es"]["reference"] == pytest.approx(measured["es"])
        assert ("reference" in summary["cost"]["sets"]["world"]["em"]) is (number == 0)
        ending = next(rule for rule in summary["verdict"]["rules"] if "extraction strength" in rule["rule"])
        assert ending["limit"] == pytest.approx(measured["es"] + 0.05)
        assert "reference" in json.loads((tmp_path / f"out{number}" / "report.json").read_text())["methods"]
    assert "reference" in capsys.readouterr().out
    wrong = ["--reference", figures, "--out", tmp_path / "no", "--max-length", 9]
    assert call("unlearn", *options(files, "forget", "retain"), *wrong) == 2
    assert_one_line(capsys, "was measured with max_length None")


def test_a_key_is_used_again_made_where_asked_and_refused_where_it_is_none(files, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    hashes = []
    for words in (["--row-key", tmp_path / "mine"], ["--row-key", tmp_path / "mine", "--force"], ["--force"]):
        hashes.append(unlearned(files, out, *words)["sets"]["forget"]["hmac_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "out.key"]
    before = copy.copy((tmp_path / "mine").read_bytes())
    job = ("unlearn", *options(files, "forget", "retain"), "--out", tmp_path / "new", *QUICK)
    assert call(*job, "--row-key", write(tmp_path / "none", "no key")) == 2
    assert_one_line(capsys, "holds no key, expected 64 hexadecimal digits")
    assert call(*job, "--row-key", tmp_path / "nowhere" / "key") == 2
    assert_one_line(capsys, "does not exist, expected an existing folder")
    assert not (tmp_path / "new").exists() and (tmp_path / "mine").read_bytes() == before


def test_rows_to_forget_are_none_of_the_unseen(files, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.delattr(AutoModelForCausalLM, "from_pretrained")
    job = ("unlearn", *options(files, "forget", "retain"), "--out", tmp_path / "out")
    assert call(*job, "--unseen", files / "forget.jsonl") == 2
    assert_one_line(capsys, "in both the forget and the unseen set")


def test_a_quantized_result_says_that_its_base_still_knows(files, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    summary = unlearned(files, tmp_path / "out", "--load-in", "8bit")
    assert any("untouched quantized base" in each for each in summary["remains"])
    assert summary["changed"]["changed"] and all(
        name.endswith(".delta") and each["before"] is None for name, each in summary["changed"]["changed"].items()
    )
