"""Demands of every registered method: a row of claims, a row of references and a line in the changelog."""

import ast
from pathlib import Path

import pytest

from balance import gradient_balancers, loss_balancers
from tests import claims

TESTS = Path(__file__).parent
CHANGELOG = (TESTS.parent / "CHANGELOG.md").read_text(encoding="utf-8")
STRINGS = {
    node.value
    for path in (TESTS / "references").glob("*.py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
}
METHODS = [
    *(pytest.param(name, claims.LOSS_ROWS, id=name) for name in loss_balancers.names()),
    *(pytest.param(name, claims.GRADIENT_ROWS, id=name) for name in gradient_balancers.names()),
]


@pytest.mark.parametrize(("name", "rows"), METHODS)
def test_method_has_a_row_of_claims(name, rows):
    assert name in rows, f"Add a row for '{name}' to tests/claims."


@pytest.mark.parametrize(("name", "rows"), METHODS)
def test_method_has_a_row_of_references(name, rows):
    assert name in STRINGS, f"Add a row for '{name}' to tests/references: a fixed input and a known result."


@pytest.mark.parametrize(("name", "rows"), METHODS)
def test_method_has_a_line_in_the_changelog(name, rows):
    assert f"`{name}`" in CHANGELOG, f"Add a line with `{name}` to CHANGELOG.md."
