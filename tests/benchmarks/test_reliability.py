"""What is tried against the package is counted from the tests of faults, all of them."""

from __future__ import annotations

import ast
from pathlib import Path

from benchmarks.reliability import ROOT, TRIED, cases, counted

KILL = "test_a_command_killed_at_any_file_operation_goes_on_and_leaves_nothing_behind"
CALL = "test_a_bad_call_says_what_was_expected_and_changes_nothing"


def test_every_test_of_faults_is_counted_or_left_out_on_purpose():
    found = {
        node.name
        for path in (ROOT / "tests" / "faults").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert found == TRIED.keys()


def test_what_a_failed_case_tried_is_not_withstood(tmp_path: Path):
    report = tmp_path / "report.xml"
    tried = '<properties><property name="tried" value="7"/></properties>'
    report.write_text(
        "<testsuites><testsuite>"
        f'<testcase classname="tests.faults.test_kills" name="{KILL}[patch apply]">{tried}</testcase>'
        f'<testcase classname="tests.faults.test_kills" name="{KILL}[unlearn]">{tried}<failure/></testcase>'
        f'<testcase classname="tests.faults.test_bad_calls" name="{CALL}[a]"/>'
        f'<testcase classname="tests.faults.test_bad_calls" name="{CALL}[b]"><error/></testcase>'
        "</testsuite></testsuites>"
    )
    rows = {row["what"]: (row["file"], row["tried"], row["withstood"]) for row in counted(cases(report))}
    assert rows == {
        "bad calls of the API": ("tests/faults/test_bad_calls.py", 2, 1),
        "kills of `patch apply`": ("tests/faults/test_kills.py", 7, 7),
        "kills of `unlearn`": ("tests/faults/test_kills.py", 7, 0),
    }
