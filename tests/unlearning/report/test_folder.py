"""A result folder appears whole or not at all, and replaces an older one by force only."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from torch_simu.unlearning.report.folder import check_new_file, check_writable, locked, remove_folder, whole_folder
from torch_simu.unlearning.report.report import MethodResult, Report, readable_bytes, write_json
from torch_simu.unlearning.report.runs import finish_run


def test_a_folder_appears_with_all_its_files(tmp_path):
    out = tmp_path / "deep" / "out"
    with whole_folder(out) as folder:
        (folder / "a.txt").write_text("a")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["a.txt"] and [*out.parent.iterdir()] == [out]


@pytest.mark.parametrize("force", [False, True])
def test_an_exception_leaves_what_was_there(tmp_path, force):
    out = tmp_path / "out"
    out.mkdir()
    if force:
        write_json(out / "report.json", {"title": "old", "methods": {}})
    with pytest.raises(RuntimeError, match="half"), whole_folder(out, force=force) as folder:
        (folder / "new.txt").write_text("new")
        raise RuntimeError("half way")
    assert [path.name for path in out.iterdir()] == (["report.json"] if force else [])
    assert [*tmp_path.iterdir()] == [out]


def test_a_file_in_the_way_and_a_full_folder_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file, expected a folder"):
        check_writable(tmp_path / "file", force=True)
    with pytest.raises(NotADirectoryError, match="is no folder"):
        check_writable(tmp_path / "file" / "out", force=True)
    with pytest.raises(FileExistsError, match="Use --force"):
        check_writable(tmp_path, force=False)


def test_force_replaces_results_only_and_never_what_is_read(tmp_path):
    thesis, out = tmp_path / "thesis", tmp_path / "out"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else than a result"):
        check_writable(thesis, force=True)
    out.mkdir()
    write_json(out / "report.json", {"title": "old", "methods": {}})
    check_writable(out, force=True, inputs=["", "locuslab/TOFU:forget01", thesis])
    for read in (out, out / "report.json"):
        with pytest.raises(FileExistsError, match="which is read, expected a folder of its own"):
            check_writable(out, force=True, inputs=[read])


def test_a_file_replaces_by_force_only_and_never_what_is_read(tmp_path):
    path = tmp_path / "figures.json"
    check_new_file(path, force=False)
    path.write_text("{}")
    with pytest.raises(FileExistsError, match="Use --force"):
        check_new_file(path, force=False)
    with pytest.raises(FileExistsError, match="is read"):
        check_new_file(path, force=True, inputs=["", path])
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_new_file(tmp_path, force=True)
    with pytest.raises(FileNotFoundError, match="does not exist, expected an existing folder"):
        check_new_file(tmp_path / "no" / "figures.json", force=False)


def test_one_process_at_a_time_works_on_a_result(tmp_path):
    with locked(tmp_path / "deep" / "out"):
        again = locked(tmp_path / "deep" / "out")
        with pytest.raises(BlockingIOError, match="Another process is working on .*, expected one at a time"), again:
            pass
        with locked(tmp_path / "deep" / "other"):
            pass
    assert not [*tmp_path.iterdir()]
    with locked(tmp_path / "out"):
        pass


@pytest.mark.parametrize("there", [False, True])
def test_what_a_killed_process_set_aside_comes_back_and_the_rest_goes(tmp_path, there):
    old, half = tmp_path / ".out.abc.torch-simu.old", tmp_path / ".out.abc.torch-simu"
    for folder in (old, half, *([tmp_path / "out"] if there else [])):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    with locked(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "name").read_text() == ("out" if there else old.name)


def test_what_was_set_aside_comes_back_before_a_call_is_refused_and_to_its_own_name_only(tmp_path):
    old = tmp_path / ".out.b.abc.torch-simu.old"
    old.mkdir()
    (old / "name").write_text("old")
    check_writable(tmp_path / "out", force=False)
    assert [*tmp_path.iterdir()] == [old]
    with pytest.raises(FileExistsError, match=r"out.b' exists and is not empty"):
        check_writable(tmp_path / "out.b", force=False)
    assert (tmp_path / "out.b" / "name").read_text() == "old"


@pytest.mark.parametrize("force", [False, True])
def test_a_run_goes_with_the_call_that_finds_its_result_and_no_other(tmp_path, force):
    out, run = tmp_path / "out", tmp_path / "out.run"
    for made in ("first", "second"):
        run.mkdir()
        with whole_folder(out, force=True, run=run) as folder:
            write_json(folder / "report.json", {"title": made, "methods": {}})
        assert [*tmp_path.iterdir()] == [out]
    # What a kill leaves: a run on its way to another result, then one whose result stands.
    for title, left in (("other", True), ("second", False)):
        run.mkdir(exist_ok=True)
        write_json(tmp_path / "report.json", {"title": title, "methods": {}})
        finish_run(run, tmp_path)
        (tmp_path / "report.json").unlink()
        with nullcontext() if force else pytest.raises(FileExistsError, match="Use --force"):
            check_writable(out, force=force)
        assert run.exists() is left and out.exists()


def test_a_removed_folder_is_gone_at_once(tmp_path):
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "a").write_text("a")
    remove_folder(tmp_path / "out.run", tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_a_read_only_parent_is_refused_before_the_work(tmp_path, monkeypatch):
    # A superuser may write anywhere, so the answer of the system is replaced rather than a permission.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="is read-only"):
        check_writable(tmp_path / "out", force=False)


def test_a_number_that_is_not_finite_is_never_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not [*tmp_path.iterdir()]


def test_the_report_has_a_row_per_method_and_shows_its_plots():
    measures = {"em": 1.0, "es": 0.5, "probability": 0.25, "qa_exact_match": 0.0}
    result = MethodResult({"forget": measures}, 0.019, 1500, 2.0, 7)
    page = Report("Title", 4, {"simu_graddiff": result}, notes=["A note."]).to_markdown(["curve_a.png"])
    assert "| simu_graddiff | 1.000 | 0.500 | 0.250 | 0.000 | 1.9 % | 1.5 kB | 7 | 2.0 |" in page
    assert "![curve a](curve_a.png)" in page and "A note." in page and "Seed 4." in page


def test_a_column_is_shown_where_every_set_was_measured():
    whole, less = {"em": 1.0, "es": 0.5, "probability": 0.25}, {"em": 0.0, "probability": 0.5, "nll": 3.0}
    report = Report("Title", 0, {"model": MethodResult({"forget": whole, "retain": less})})
    assert report.header() == ["method", "forget EM", "forget prob.", "retain EM", "retain prob."]
    assert report.rows()[0][1:5] == ["1.000", "0.250", "0.000", "0.500"]
    assert "EM: exact memorization, prob.: probability of the answer." in report.to_markdown()
    assert report.to_json()["methods"]["model"]["forget"] == whole


def test_what_is_not_known_of_a_method_is_absent():
    measures = {"em": 1.0, "es": 0.5, "probability": 0.25, "qa_exact_match": 0.0}
    results = {"model": MethodResult({"forget": measures}), "trained": MethodResult({"forget": measures}, 0.0, 0)}
    report = Report("Title", 0, results)
    assert report.header()[-2:] == ["changed", "state"]
    assert [row[-2:] for row in report.rows()] == [["", ""], ["0 %", "0 B"]]
    assert set(report.to_json()["methods"]["model"]) == {"forget"}
    assert set(report.to_json()["methods"]["trained"]) == {"forget", "changed_share", "optimizer_bytes"}


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (2.5e9, "2.5 GB"), (3e12, "3 TB")])
def test_bytes_are_readable(count, text):
    assert readable_bytes(int(count)) == text
