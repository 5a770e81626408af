"""README.md: its length, targets, links and numbers. Its snippet is run by conftest.py, its commands by test_commands.py."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EVIDENCE = (ROOT / "docs/choose/which_method.md").read_text(encoding="utf-8")
RESULTS = [ROOT / "experiments/README.md", ROOT / "docs/choose/which_method.md", *(ROOT / "docs/experiments").glob("*.md")]


def test_length():
    assert len(TEXT.splitlines()) <= 160


def test_make_targets():
    targets = re.findall(r"^make (\w+)$", TEXT, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
    demo = subprocess.run(["make", "-n", "-W", "pyproject.toml", "demo"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "experiments/trainer.py --loss_method=go4align --gradient_method=pcgrad" in demo.stdout


def test_files_of_links_exist():
    targets = re.findall(r"\]\((?!https?://|#)([^)]+)\)", TEXT)
    assert {"docs/_static/pipeline.svg", "CONTRIBUTING.md", "CHANGELOG.md"} <= set(targets)
    assert len([target for target in targets if target.startswith("docs/")]) >= 10
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def results():
    """Rows of the tables of results, as sets of cells; signs and bold type are left out."""
    rows = [row for page in RESULTS for row in page.read_text(encoding="utf-8").splitlines() if row.startswith("| ")]
    return [[re.sub(r"[*≈?\\]", "", cell).strip().replace(" + ", "+") for cell in row.strip("| ").split(" | ")] for row in rows]


NAMES = {"equal weights": {"ls"}, "famo": {"famo"}, "nashmtl": {"ls+nashmtl"}, "tuned weights": {"constant"}}


def evidence():
    """Numbers of the table of evidence, each with the names of its row in the tables of results."""
    (header, _, *rows) = re.search(r"^\| problem \|.*?(?=\n\n)", EVIDENCE, flags=re.MULTILINE | re.DOTALL)[0].splitlines()
    methods = [cell.strip("` ") for cell in header.split("|")[3:6]]
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        yield from ((NAMES[method], cell) for method, cell in zip(methods, cells[2:5], strict=True) if cell != "-")
        name, _, best = cells[5].rpartition(", ")
        if name:
            plain = name.replace("`", "").replace(" + ", "+")
            yield NAMES.get(plain, {plain, f"ls+{plain}"}), best


@pytest.mark.parametrize(("names", "number"), [pytest.param(*pair, id=f"{min(pair[0])}-{pair[1]}") for pair in evidence()])
def test_evidence_is_in_a_table_of_results(names, number):
    assert any(row[0] in names and number in row[1:] for row in results())


def test_numbers_of_the_readme_are_in_the_evidence():
    numbers = re.findall(r"[\d.]+ ± \d+\.\d+", TEXT)
    assert len(numbers) == 3
    assert all(number in EVIDENCE for number in numbers)
