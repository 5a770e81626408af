"""Tables of the README agree with the sources; its commands are in test_commands.py, and conftest.py runs its snippets."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_defects_names_tests_that_exist():
    table = TEXT.split("### Defects of published code")[1].split("## ")[0]
    named = set(re.findall(r"`(test_\w+)`", table))
    assert len(named) >= 10
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", file.read_text("utf-8"))
    }
    assert named <= defined


def test_tables_and_figure_of_benchmarks_are_the_recorded_ones(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from show import rules_table, steps_table

    newest = max((ROOT / "benchmarks/results").glob("*_rules_*.json"))
    assert rules_table(json.loads(newest.read_text("utf-8"))["results"]) in TEXT
    figure = ROOT / re.search(r"\((benchmarks/results/\S+_jacobian_\S+\.png)\)", TEXT)[1]
    assert figure.exists()
    recorded = json.loads(figure.with_suffix(".json").read_text("utf-8"))["results"]
    assert steps_table(recorded, 11) in TEXT
