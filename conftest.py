"""Snippets of README.md, of the documentation and of docstrings, run as tests in the order of their page.

``<!-- requires: a, b -->`` on a page skips its snippets where a package is missing; ``<!-- slow -->`` marks them as slow. A
snippet whose first line contains ``torchrun`` runs on two processes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.myst import CodeBlockParser
from sybil.parsers.rest import DocTestParser
from sybil.parsers.rest import PythonCodeBlockParser as RestCodeBlockParser

import balance
from balance.diagnosis import measurement
from tests import conftest as settings  # noqa: F401 - environment, threads and hypothesis

if TYPE_CHECKING:
    from sybil import Example

ROOT = Path(__file__).parent
REQUIRES = re.compile(r"<!-- requires: (.+?) -->")
SLOW = "<!-- slow -->"
run_in_process = PythonEvaluator()


def evaluate(example: Example) -> str | None:
    """Run a snippet in this process, or on two processes if it is for torchrun."""
    if "torchrun" in example.parsed.partition("\n")[0]:
        return run_on_two_processes(example)
    return run_in_process(example)


def run_on_two_processes(example: Example) -> str | None:
    """Run a snippet under torchrun; both processes must print the same."""
    program = Path("train.py")
    program.write_text(example.parsed, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, program], capture_output=True, text=True, timeout=120, env=environment)
    if done.returncode:
        return done.stderr
    printed = done.stdout.replace("\n", "")  # unbuffered processes write a line and its end separately
    first, second = printed[: len(printed) // 2], printed[len(printed) // 2 :]
    if not printed:
        return "the processes print nothing"
    return None if first == second else f"the processes print different lines:\n{done.stdout}"


def begin(namespace: dict[str, Any]) -> None:
    """Enter a temporary directory, save the registries, which snippets change, and shorten the timing of `diagnose`."""
    patches = pytest.MonkeyPatch()
    for registry in (balance.loss_balancers, balance.gradient_balancers):
        patches.setattr(registry, "_methods", dict(registry._methods))
    patches.setattr(measurement, "ROUNDS", 1)
    folder = tempfile.TemporaryDirectory(prefix="page-", ignore_cleanup_errors=True)  # a tracker may keep a file open
    patches.chdir(folder.name)
    namespace["_patches"], namespace["_folder"] = patches, folder


def end(namespace: dict[str, Any]) -> None:
    """Undo the changes of a page."""
    namespace["_patches"].undo()
    namespace["_folder"].cleanup()


PAGES = {"setup": begin, "teardown": end}
in_markdown = Sybil(
    [CodeBlockParser(language="python", evaluator=evaluate)],
    patterns=["README.md", "CONTRIBUTING.md", "docs/**/*.md"],
    excludes=["docs/methods/loss/*", "docs/methods/gradient/*"],  # generated
    **PAGES,
)
in_docstrings = Sybil([DocTestParser(), RestCodeBlockParser()], patterns=["balance/**/*.py"], **PAGES)
pytest_collect_file = (in_markdown + in_docstrings).pytest()


@cache
def marks(page: Path) -> list[pytest.MarkDecorator]:
    """Return the marks of a page's snippets."""
    text = page.read_text(encoding="utf-8")
    packages = [name for found in REQUIRES.findall(text) for name in found.split(", ")]
    missing = [name for name in packages if find_spec(name) is None]
    skipped = [pytest.mark.skip(reason=f"{', '.join(missing)} not installed")] if missing else []
    return [*skipped, *([pytest.mark.slow] if SLOW in text else [])]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the snippets of pages that are slow or need packages."""
    for item in items:
        if item.path.suffix == ".md":
            for mark in marks(item.path):
                item.add_marker(mark)
