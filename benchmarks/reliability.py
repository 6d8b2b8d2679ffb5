"""Count what was tried against the package, by running the tests of faults, and how much of it was withstood.

Usage: python -m benchmarks.reliability [--out FILE] [--force]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from xml.etree import ElementTree

from benchmarks.results import RESULTS, command, environment, write_result

ROOT = Path(__file__).parents[1]

TRIED: Mapping[str, str | None] = MappingProxyType(
    {
        "test_there_are_at_least_200_bad_calls": None,
        "test_a_bad_call_says_what_was_expected_and_changes_nothing": "bad calls of the API",
        "test_there_are_at_least_250_bad_command_lines": None,
        "test_a_bad_command_line_gets_one_line_and_changes_nothing": "bad command lines",
        "test_there_are_at_least_200_bad_rows_and_files": None,
        "test_a_bad_record_is_refused_with_its_line": "bad rows",
        "test_a_bad_line_is_refused_with_its_number": "bad rows",
        "test_a_bad_file_is_refused_with_its_name": "bad files of rows",
        "test_a_row_that_the_template_does_not_write_is_refused_with_its_line": "bad chat templates",
        "test_an_answer_that_does_not_fit_is_refused_with_its_line": "bad rows",
        "test_a_row_that_the_model_cannot_read_is_refused_with_its_line": "bad rows",
        "test_a_damaged_file_of_any_kind_is_refused_in_one_line_that_names_it": "cut, lengthened and changed files",
        "test_a_file_of_any_kind_with_a_single_bit_changed_is_refused": "every single bit of a file changed",
        "test_a_file_of_another_kind_is_refused": "files of another kind",
        "test_damaged_weights_under_a_patch_are_refused_and_nothing_is_written": None,
        "test_deltas_that_do_not_fit_are_refused_before_anything_is_attached": "forged files with a right checksum",
        "test_a_patch_that_does_not_fit_itself_is_refused_when_it_is_read": "forged files with a right checksum",
        "test_a_command_killed_at_any_file_operation_goes_on_and_leaves_nothing_behind": "kills of `{case}`",
        "test_a_result_is_whole_whenever_the_command_that_replaces_it_is_killed": "kills of `unlearn --force`",
        "test_an_interrupted_run_says_the_step_from_which_it_goes_on": "Ctrl-C and SIGTERM",
        "test_a_command_that_starts_anew_says_so_and_leaves_nothing": "Ctrl-C and SIGTERM",
        "test_before_the_first_step_it_says_what_is_saved": None,
        "test_an_interrupt_behind_the_last_step_says_that_the_result_is_complete": "Ctrl-C and SIGTERM",
        "test_a_second_process_on_one_result_gets_one_line_and_harms_nothing": "second processes on one `--out`",
        "test_a_call_leaves_the_handlers_of_signals_as_they_were": None,
    }
)
"""Test -> what it tries; None: a count of its own says nothing."""


def cases(report: Path) -> Iterator[dict[str, object]]:
    """How many things each case of a JUnit report tried, one where it does not say, and how many were withstood."""
    for case in ElementTree.parse(report).iter("testcase"):
        test, _, name = case.attrib["name"].partition("[")
        properties = {each.attrib["name"]: int(each.attrib["value"]) for each in case.iter("property")}
        tried = properties.get("tried", 1)
        held = all(case.find(wrong) is None for wrong in ("failure", "error", "skipped"))
        file = case.attrib["classname"].replace(".", "/") + ".py"
        yield {"file": file, "test": test, "case": name[:-1], "tried": tried, "withstood": tried if held else 0}


def counted(found: Iterable[dict[str, object]]) -> list[dict[str, object]]:
    """One row for each thing that is tried, in the order of `TRIED`."""
    rows: dict[str, dict[str, object]] = {}
    for each in sorted(found, key=lambda each: list(TRIED).index(each["test"])):
        if (what := TRIED[each["test"]]) is None:
            continue
        what = what.format(case=each["case"])
        row = rows.setdefault(what, {"what": what, "file": each["file"], "tried": 0, "withstood": 0})
        for key in ("tried", "withstood"):
            row[key] += each[key]
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability_cpu_202611.json")
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        call = ["pytest", "-q", "-p", "no:xdist", f"--junitxml={report}", "-o", "junit_family=xunit1", "tests/faults"]
        # By night everything is tried, and not one of several.
        night = {**os.environ, "HYPOTHESIS_PROFILE": "nightly"}
        subprocess.run([sys.executable, "-m", *call], cwd=ROOT, env=night)
        rows = counted(cases(report))
    write_result(
        options.out,
        claim="reliability",
        force=options.force,
        command=command(),
        environment=environment(),
        seeds=[0, 1, 2],
        rows=rows,
    )


if __name__ == "__main__":
    main()
