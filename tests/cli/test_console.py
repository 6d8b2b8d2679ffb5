"""What the command line prints goes through `say` and `plain`: text of others is shown, and not acted on."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.language import ROWS, tiny_model, word_tokenizer
from torch_simu import cli
from torch_simu.cli.bars import staged
from torch_simu.cli.console import plain, progress_bars, quiet_casts, say, show_attacks, show_report, show_rows
from torch_simu.unlearning.attack.result import AttackPoint, AttackResult
from torch_simu.unlearning.report.report import MethodResult, Report

FILES = sorted(Path(str(cli.__file__)).parent.glob("*.py"))


@given(st.text())
def test_plain_text_has_nothing_that_a_terminal_acts_on(text: str) -> None:
    shown = plain(text)
    assert all(each.isprintable() or unicodedata.category(each) == "Zs" for each in shown)
    assert plain(shown) == shown
    # Lone surrogates, too, which no file can be written with.
    assert isinstance(plain(text + "\ud800").encode(), bytes)


@pytest.mark.parametrize("text", ["Zürich, Ærø, 東京 ☂", "a\u00a0b", "[bold]", r"C:\\x"])
def test_plain_text_of_people_stays_as_it_is(text: str) -> None:
    assert plain(text) == text


@given(st.text(max_size=200))
def test_one_line_is_printed_as_one_line_and_without_markup(text: str) -> None:
    written = io.StringIO()
    say(Console(file=written, width=10_000, force_terminal=False), text)
    assert written.getvalue().rstrip(" \n") == plain(text).rstrip(" ")


def test_the_bars_show_names_as_they_are() -> None:
    written = io.StringIO()
    with progress_bars(Console(file=written, width=200, force_terminal=False)) as tell:
        tell("evaluate [red]x[/]", 1, 1, "[bold]")
    assert "evaluate [red]x[/]" in written.getvalue() and "[bold]" in written.getvalue()


def test_the_bars_keep_their_speed_when_the_expected_end_moves() -> None:
    written = io.StringIO()
    with progress_bars(Console(file=written, width=80, force_terminal=False)) as tell:
        for step, total in enumerate((100, 60, 33), 1):
            tell("unlearn", step, total, f"about {total - step} steps left")
            time.sleep(0.05)
    assert "3/33" in written.getvalue() and "about 30 steps left" in written.getvalue()
    # Thirty steps at twenty each second or slower: not 0, and not unknown.
    (left,) = [word for word in written.getvalue().split() if word[:2].isdigit() and word[2:3] == ":"]
    assert left >= "00:01"


@pytest.mark.parametrize("stage", ["unlearn", "random_neurons: attribute retain"])
def test_nothing_of_a_bar_is_cut_at_80_columns(stage: str) -> None:
    written = io.StringIO()
    with progress_bars(Console(file=written, width=80, force_terminal=False)) as tell:
        tell(stage, 12, 200, "forget prob. 0.412, about 188 steps left")
    words = written.getvalue().split()
    assert {*stage.split(), "12/200", "0.412,", "188", "left"} <= set(words) and "…" not in written.getvalue()


MEASURES = {"em": 1.0, "es": 0.5, "probability": 0.125}


def table(sets, *costs, methods=("before", "attention_only"), width=200) -> str:
    """A report as it is shown, the costs known of its last method."""
    written = io.StringIO()
    results = {name: MethodResult(dict.fromkeys(sets, MEASURES)) for name in methods[:-1]}
    results[methods[-1]] = MethodResult(dict.fromkeys(sets, MEASURES), *costs)
    show_report(Console(file=written, width=width, force_terminal=False), Report("Title", 0, results))
    return written.getvalue()


NAMES = ("forget", "retain", "real_authors", "world_facts", "a_set_with_a_name_of_many_words_that_no_cell_holds")


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("costs", [(), (0.0165, 3_221_000, 1234.0, 7)])
@pytest.mark.parametrize("last", ["attention_only", "a_method_with_a_name_of_many_words"])
def test_the_table_of_any_number_of_sets_fits_80_columns_and_shows_each_whole(count, costs, last) -> None:
    for sets in (NAMES[:count], NAMES[-count:]):
        shown = table(sets, *costs, methods=("before", last))
        assert max(map(len, shown.splitlines())) <= 80
        assert shown.count("1.00 .500 .125") == 2 * count and "…" not in shown
        # Names are folded, and never cut.
        columns = "".join(shown.split())
        assert all(name in columns for name in sets if len(name) <= 14)
        assert not costs or all(text in shown for text in ("1.65 %", "3.22 MB", "1234"))


def test_the_table_of_three_sets_with_costs_is_one() -> None:
    shown = table(("forget", "retain", "world"), 0.0165, 3_221_000, 12.0, 7)
    assert shown.count("attention_only") == 1


def test_two_long_names_stay_two() -> None:
    pair = ("retain_perturbed_a", "retain_perturbed_b")
    shown = table(pair)
    assert ["retain_perturb", "retain_perturb"] in [line.split() for line in shown.splitlines()]
    assert ["ed_a", "ed_b"] in [line.split() for line in shown.splitlines()]


def test_a_cost_has_a_column_where_a_method_has_it() -> None:
    assert "weights" not in table(("forget", "retain")) and "state" not in table(("forget", "retain"))
    shown = table(("forget", "retain"), 0.5)
    assert "50 %" in shown and "state" not in shown


def test_what_comes_back_has_a_column_in_place_of_the_seconds() -> None:
    back = {"relearn": {"probability": 0.617, "es": 0.25}}
    shown = table(("forget", "retain", "world"), 0.0165, 3_221_000, 12.0, 7, back)
    lines = shown.splitlines()
    assert lines[2].split()[-1] == "back" and lines[-1].endswith(".617") and "12" not in lines[-1].split()
    assert all(text in shown for text in ("1.65 %", "3.22 MB"))
    assert max(map(len, lines)) <= 80 and shown.count("attention_only") == 1
    narrow = table(("forget", "retain", "world"), 0.0165, 3_221_000, 12.0, 7, back, width=80)
    assert [line.rstrip() for line in narrow.splitlines()] == [line.rstrip() for line in lines]
    # Another attack is in the report.
    assert "back" not in table(("forget", "retain"), 0.5, None, None, None, {"round_8bit": back["relearn"]})


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def on(monkeypatch: pytest.MonkeyPatch, kind: type[io.StringIO], **variables: str) -> io.StringIO:
    """Let standard error be a terminal or a file."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "80", **variables}.items():
        monkeypatch.setenv(name, value)
    written = kind()
    monkeypatch.setattr(sys, "stderr", written)
    return written


@pytest.mark.parametrize("dumb", [False, True])
def test_where_there_is_no_terminal_a_stage_gets_a_line_when_it_is_complete_and_each_ten_seconds(
    dumb: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors, now = on(monkeypatch, Terminal if dumb else io.StringIO, TERM="dumb"), [0.0]
    monkeypatch.setattr("torch_simu.cli.bars.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with staged(Console(file=out), "all of it") as tell:
        for number in range(10):
            tell("all of it", number, 10)
            for step in range(1, 101):
                now[0] += 0.25
                tell(f"[b]stage[/b] {number}", step, 100, f"at {step}")
            # Told again, it is not said again.
            tell(f"[b]stage[/b] {number}", 100, 100, "at 100")
    lines = errors.getvalue().splitlines()
    assert lines[:3] == [f"[b]stage[/b] 0: {step} of 100, at {step}" for step in (41, 81, 100)]
    assert len(lines) == 30 and "all of it" not in errors.getvalue() and out.getvalue() == ""


@pytest.mark.parametrize("where", ["both", "errors"])
def test_on_a_terminal_there_is_one_bar_of_the_whole_and_one_of_the_stage_and_nothing_is_cut(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = on(monkeypatch, Terminal)
    out = Terminal() if where == "both" else io.StringIO()
    console = Console(file=out, width=80)
    drawn, quiet = (out, errors) if where == "both" else (errors, out)
    with staged(console, "models") as tell:
        tell("models", 3, 9, "about 2 minutes left")
        for name in ("simu: unlearn", "attention_only: attack relearn", "random_neurons: attribute retain"):
            before = len(drawn.getvalue())
            for step in range(1200):
                tell(name, step, 1200, "forget prob. 0.412 (target 0.1), about 17 steps left")
            time.sleep(0.25)
            shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.getvalue()[before:])
            words = shown.split()
            assert {*name.split(), "models", "3/9", "1199/1200", "0.412", "(target", "17", "left"} <= set(words)
            assert "…" not in shown and max(map(len, re.split("[\r\n]", shown))) <= 80
            # The stages before are gone.
            assert len({word for word in words[-40:] if word.endswith(":")}) == 1
        say(console, "a row")
    assert "a row" in out.getvalue() and (quiet.getvalue() in ("", "a row\n"))


def test_rows_that_are_printed_one_by_one_are_the_lines_of_the_table() -> None:
    back = {"relearn": {"probability": 0.617, "es": 0.25}}
    names = ("before", "simu_graddiff", "all_neurons")
    sets = ("forget", "retain", "world")
    results = {
        name: MethodResult(dict.fromkeys(sets, MEASURES), 0.0165 * number, 10**number, 1.0, 7, back)
        for number, name in enumerate(names)
    }
    whole, line_by_line = io.StringIO(), io.StringIO()
    show_report(Console(file=whole, width=80), Report("Title", 0, results))
    show = show_rows(Console(file=line_by_line, width=80), names)
    for name, result in results.items():
        show(name, result)
    lines = line_by_line.getvalue().splitlines()
    assert [line.split() for line in lines] == [line.split() for line in whole.getvalue().splitlines()[1:]]
    assert max(map(len, lines)) <= 80 and len({line.rindex(" ") for line in lines[1:]}) == 1


def test_attacks_are_shown_line_by_line_before_and_after() -> None:
    before = AttackPoint(0.04, 0.0)
    made = AttackResult(before, (AttackPoint(0.617, 0.25, 1e-4, 5), AttackPoint(0.5, 1.0, 1e-4, 10)), 4, 2)
    skipped = AttackResult(before, (), 4, 0, "its weights are codes already")
    written = io.StringIO()
    found = {"relearn": made, "round_8bit": skipped}
    show_attacks(Console(file=written, width=80), "Title", {"model": found, "[b]reference": found})
    lines = [line.split() for line in written.getvalue().splitlines()]
    assert lines[-2:] == [
        ["relearn", *(".040", ".000", ".617", "1.00") * 2],
        ["round_8bit", *(".040", ".000", "skipped") * 2],
    ]
    assert lines[1] == ["model", "model", "[b]reference", "[b]reference"]


CAST = "MatMul8bitLt: inputs will be cast from torch.float32 to float16 during quantization"


def test_casts_are_silent_in_the_block_only_and_other_notices_never(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    with quiet_casts():
        logger.error(CAST)
        logger.error("something else")
    logger.error(CAST)
    assert [record.getMessage() for record in caplog.records] == ["something else", CAST]


@pytest.mark.slow
def test_an_eight_bit_model_forgets_with_nothing_on_standard_error(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tokenizer = word_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, rows in (("forget", ROWS[:2]), ("retain", ROWS[2:])):
        lines = (json.dumps({"question": row.question, "answer": row.answer}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    words = "unlearn --model model --forget forget.jsonl --retain retain.jsonl --out out --load-in 8bit --max-steps 2"
    program = [sys.executable, "-m", "torch_simu", *words.split(), "--forget-target", "0"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
    assert "2/2" in done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_the_console_prints(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    printed = [call.lineno for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "print"]
    assert path.name == "console.py" or not printed, f"lines {printed}: use say(console, line), one line at a time"
