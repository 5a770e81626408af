"""README.md: its length, targets, links and numbers. Its snippet is run by conftest.py, its commands by test_commands.py."""

import re
import subprocess
from pathlib import Path

from balance import gradient_balancers, loss_balancers
from balance.diagnosis.advice import BALANCED, UNBALANCED
from experiments.studies.advice import mean_regrets, regrets
from experiments.studies.ranking import rank_methods
from experiments.studies.record import read_record
from experiments.studies.report import result_table

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EVIDENCE = (ROOT / "docs/choose/which_method.md").read_text(encoding="utf-8").partition("## Diagnose first")[0]
RECORD = read_record()


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


def test_numbers_of_the_study_are_in_its_record():
    """Every number of a method in the README and on the page of the study is a cell of the generated table."""
    cells = {cell.text for line in result_table(RECORD, rank_methods(RECORD)).lines for cell in line}
    numbers = [number for text in (TEXT, EVIDENCE) for number in re.findall(r"-?[\d.]+ ± \d+\.\d+", text)]
    assert len(numbers) > 3
    assert set(numbers) <= cells


def test_regrets_on_the_page_are_in_the_record():
    """Sentences of the form "a mean regret of 1.2 points" name numbers of the generated table."""
    means = {f"{mean:.1f}" for mean in mean_regrets(regrets(RECORD)).values()}
    named = [number for text in (TEXT, EVIDENCE) for number in re.findall(r"mean regret[^.|]*? of (\d+\.\d)\b", text)]
    assert named
    assert set(named) <= means


def test_advice_in_words_is_the_advice_of_the_library():
    """The pairs that the library can advise are named on the page."""
    for loss, gradient in {BALANCED, UNBALANCED}:
        assert f"`{gradient}`" in EVIDENCE if gradient else "equal weights" in EVIDENCE
        assert loss in loss_balancers
        assert gradient is None or gradient in gradient_balancers
