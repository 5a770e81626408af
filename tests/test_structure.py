import statistics

import pytest

import balance
from tests import structure


@pytest.mark.parametrize("check", [name for name in structure.NAMES if name != "median"])
def test_sources_keep_structure(check):
    broken = [v for v in structure.violations() if v.check == check and not structure.is_listed(v)]
    assert not broken, "\n" + "\n".join(map(str, broken))


def test_median_function_is_short():
    assert statistics.median(structure.bodies()) <= structure.MEDIAN


def test_dir_of_balance_is_its_public_names():
    on_first_use = {"Comparison", "compare", "comparison", "config", "integrations", "metrics", "testing", "tracking"}
    assert set(dir(balance)) == {*balance.__all__, *on_first_use}


@pytest.mark.parametrize(
    ("source", "lines", "depth"),
    [
        ("def f():\n    'doc'\n", 0, 0),
        ("def f(): ...\n", 0, 0),
        ("def f():\n    'doc'\n\n    return (\n        1\n    )\n", 3, 0),
        ("def f():\n    if a:\n        pass\n    elif b:\n        pass\n    else:\n        pass\n", 6, 1),
        ("def f():\n for a in b:\n  with c:\n   try:\n    d\n   finally:\n    e\n", 6, 3),
        ("def f():\n    if a:\n        def g():\n            if b:\n                pass\n", 4, 1),
        ("def f():\n    if a:\n        pass\n    else:\n        if b:\n            pass\n        c\n", 6, 2),
        ("def f():\n    try:\n        a\n    except E:\n        if b:\n            c\n", 5, 2),
    ],
)
def test_lines_and_nesting_of_function(source, lines, depth):
    function = structure.ast.parse(source).body[0]
    assert structure.length(function) == lines
    assert structure.nesting(structure.body_of(function)) == depth


@pytest.mark.parametrize(("name", "rule"), [("rule", True), ("_loss", True), ("inner_balancer", True), ("loss_options", False)])
def test_names_of_rules(name, rule):
    assert structure.is_rule(name) is rule


def test_import_of_the_library_by_its_name_is_found(tmp_path, monkeypatch):
    source = "import balance.types\nfrom balance.rules import build\nfrom .rules import build\nimport balanced\n"
    (tmp_path / "module.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(structure, "files", lambda _: [tmp_path / "module.py"])
    monkeypatch.setattr(structure, "relative", str)
    assert [violation.line for violation in structure.absolute_imports()] == [1, 2]


def test_circle_is_found():
    assert structure._way({"a": {"b"}, "b": {"c"}, "c": {"a"}}, "a") == ["a", "b", "c", "a"]
    assert structure._way({"a": {"b"}, "b": {"c"}}, "a") is None
