"""A type checker reads the package where it is installed, also from a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.package.environment import copied, new_environment

USER = """\
from torch_simu import NeuronSelection, SIMUOptimizer

def count(selection: NeuronSelection, optimizer: SIMUOptimizer) -> int:
    reveal_type(optimizer.hessian_due)
    selection.layers
    return selection.num_selected
"""

# To read torch and the others takes a minute, and says nothing of the package.
CONFIG = "[mypy]\nstrict = true\nfollow_imports = skip\n[mypy-torch_simu.*]\nfollow_imports = normal\n"


@pytest.mark.slow
def test_a_strict_type_checker_reads_an_editable_install(tmp_path: Path) -> None:
    python = new_environment(tmp_path / "environment", "--editable", str(copied(tmp_path / "source")))
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    call = [sys.executable, "-m", "mypy", "--python-executable", str(python), "user.py"]
    # Paths that lead to a checkout would hide how the package is installed.
    elsewhere = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=elsewhere)
    assert done.stdout.splitlines()[:-1] == [
        'user.py:4: note: Revealed type is "bool"',
        'user.py:5: error: "NeuronSelection" has no attribute "layers"  [attr-defined]',
    ], done.stdout + done.stderr
