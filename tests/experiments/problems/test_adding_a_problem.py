"""A new problem is one folder and a line in the changelog, and nothing else.

The folder is the example of docs/experiments/own_problem.md. It is added to a copy of the project, whose commands and tests
then run in other processes.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/experiments/own_problem.md").read_text(encoding="utf-8")
FOLDER = {
    "__init__.py": re.search(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)[1],
    "config.yaml": re.search(r"^```yaml\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)[1],
}
COMMANDS = """
import sys

from experiments import compare, sweep, trainer

problem = ["--experiment=bits", "--output_dir=runs"]
assert trainer.main([*problem, "--loss_method=uw", "--gradient_method=pcgrad", "log_model=false", "data.samples=40"]) == 0
assert sweep.main([*problem, "--loss_method=ls,famo", "--gradient_method=none,cagrad", "--seeds=2", "--dry_run"]) == 0
assert compare.main([*problem, "--baselines=none", "--table_only"]) == 0
try:
    trainer.main([*problem, "data.samples=0"])
except SystemExit as refused:
    assert refused.code == 2
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the project with a further problem, without its line in the changelog."""
    for package in ("balance", "experiments", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    folder = tmp_path / "experiments" / "problems" / "bits"
    folder.mkdir()
    for name, text in FOLDER.items():
        (folder / name).write_text(text, encoding="utf-8")
    return tmp_path


def python(copy, *words):
    """Run a command on the copy, and return its exit code and its output."""
    environment = os.environ | {"PYTHONPATH": str(copy), "COLUMNS": "200"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_folder_is_all_that_the_commands_need(copy):
    code, printed = python(copy, "-c", COMMANDS)
    assert code == 0, printed
    for expected in ("bits: uw + pcgrad", "parity", "count", "12 runs", "data.samples must be at least 1, but got 0"):
        assert expected in printed


@pytest.mark.slow
def test_demands_of_problems_are_a_folder_and_a_line_in_the_changelog(copy):
    demands = [
        "-m",
        "pytest",
        "-q",
        "-k",
        "bits or summaries",
        *map(str, copy.glob("tests/experiments/problems/test_[be]*.py")),
    ]
    code, printed = python(copy, *demands)
    assert code == 1
    failed = re.findall(r"^FAILED \S+::(\S+)", printed, flags=re.MULTILINE)
    assert failed == ["test_problem_has_a_line_in_the_changelog[bits]"], printed
    with (copy / "CHANGELOG.md").open("a", encoding="utf-8") as changelog:
        changelog.write("\n- Problem `bits`.\n")
    code, printed = python(copy, *demands)
    assert code == 0, printed
