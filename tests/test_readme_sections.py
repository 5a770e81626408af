import pytest

from balance.rules.registry import Registry
from tests import readme_sections

README = readme_sections.ROOT / "README.md"


def test_readme_has_the_generated_sections():
    text = README.read_text(encoding="utf-8")
    assert readme_sections.generated(text) == text, "Run python tests/readme_sections.py --write"


def test_table_of_methods_shows_traits_and_options():
    registry = Registry("gradient balancer", "none")
    paper = "Doe & Roe 2030, https://example.org/a; Roe 2031, https://example.org/b"
    traits = {"paper": paper, "remedies": ["conflict", "loss scale"], "needs": ["optimizer", "all tasks"], "heads": "weighted"}

    @registry.register("new", label="New", **traits)
    def new(gramian, *, power: float, size: float = 1e-4, number: int = 3, flag: bool = False, seed: int = 0):
        return gramian

    registry.register("bare")(lambda gramian: gramian)
    assert readme_sections.methods_table(registry, heads=True).splitlines() == [
        "| gradient balancer | paper | remedies | needs | heads | options (default) |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `bare` | bare | - | - | unweighted | - |",
        "| `new` | New, [Doe & Roe 2030](https://example.org/a), [Roe 2031](https://example.org/b) | conflict, loss scale "
        "| its parameters in the optimizer, all tasks at each step | weighted "
        "| `power` (required), `size` (0.0001), `number` (3), `flag` (False) |",
    ]


def test_table_leaves_out_rules_of_other_packages():
    registry = Registry("loss balancer", "none")

    def rule(losses):
        return losses

    rule.__module__ = "other_package.rules"
    registry.register("other")(rule)
    assert len(readme_sections.methods_table(registry, heads=False).splitlines()) == 2


def test_tree_lists_folders_before_files_with_the_first_sentence(tmp_path, monkeypatch):
    files = {
        "balance/loss/__init__.py": "Loss balancers. Importing registers them.",
        "balance/loss/scale.py": "Scale.",
        "balance/loss/_checks.py": "Checks.",
        "balance/zoo/__init__.py": "Rooms of ``x.y``, on\nseveral lines\n\nMore.",
        "balance/zoo/lion.py": "Lions.",
        "balance/__init__.py": "All.",
        "balance/apes.py": "Apes.",
        "experiments/trainer.py": "Train.",
    }
    for name, docstring in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'"""{docstring}"""\n', encoding="utf-8")
    monkeypatch.setattr(readme_sections, "ROOT", tmp_path)
    assert readme_sections.tree().splitlines()[1:7] == [
        "    balance/",
        "      loss/              Loss balancers: scale",
        "      zoo/               Rooms of `x.y`, on several lines",
        "      apes.py            Apes",
        "    experiments/",
        "      trainer.py         Train",
    ]


def test_missing_markers_are_named():
    text = README.read_text(encoding="utf-8").replace("<!-- end of tree -->", "")
    with pytest.raises(ValueError, match="markers of the section 'tree' once, but has them 0 times"):
        readme_sections.generated(text)


def test_sections_that_differ_are_reported_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readme_sections, "ROOT", tmp_path)
    monkeypatch.setattr(readme_sections, "SECTIONS", {"tree": lambda: "new"})
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + readme_sections.MARKED.format("tree", "old") + "\nafter\n", encoding="utf-8")
    assert readme_sections.main([]) == 1
    assert "Run python tests/readme_sections.py --write" in capsys.readouterr().out
    assert readme_sections.main(["--write"]) == 0
    assert readme.read_text(encoding="utf-8") == "before\n" + readme_sections.MARKED.format("tree", "new") + "\nafter\n"
    assert readme_sections.main([]) == 0
