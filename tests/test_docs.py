"""Every snippet of the pages in docs/ is run, page by page, in the order of the page."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
REQUIRES = re.compile(r"<!-- requires: (.+?) -->")  # packages whose absence skips the page
SLOW = "<!-- slow -->"
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def parameters():
    for page in PAGES:
        marks = [pytest.mark.slow] if SLOW in page.read_text(encoding="utf-8") else []
        yield pytest.param(page, id=page.relative_to(ROOT / "docs").as_posix(), marks=marks)


@pytest.mark.parametrize("page", list(parameters()))
def test_page(page, tmp_path):
    """The snippets of a page are one program, which must print something."""
    text = page.read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    if not snippets:
        return
    packages = [name for found in REQUIRES.findall(text) for name in found.split(", ")]
    if missing := [name for name in packages if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed")
    program = tmp_path / "page.py"
    program.write_text("\n".join(snippets), encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_OFFLINE": "1",
    }
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in LINK.findall(prose):
        assert (page.parent / link).exists(), link
