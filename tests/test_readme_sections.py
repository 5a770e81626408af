import pytest

from balance.rules.registry import Registry
from tests import readme_sections

ROOT, SECTIONS = readme_sections.ROOT, readme_sections.SECTIONS


@pytest.mark.parametrize("file", SECTIONS)
def test_files_have_the_generated_sections(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert readme_sections.generated(text, SECTIONS[file]) == text, "Run python tests/readme_sections.py --write"


def test_table_of_methods_shows_traits_and_links_to_their_modules():
    registry = Registry("gradient balancer", "none")
    paper = "Doe & Roe 2030, https://example.org/a; Roe 2031, https://example.org/b"
    traits = {"paper": paper, "remedies": ["conflict", "loss scale"], "needs": ["optimizer", "all tasks"], "heads": "weighted"}
    registry.register("new", label="New", **traits)(lambda gramian: gramian)
    registry.register("bare")(lambda gramian: gramian)
    assert readme_sections.methods_table(registry).splitlines() == [
        "| gradient balancer | paper | remedies | needs |",
        "| --- | --- | --- | --- |",
        "| [`bare`](tests/test_readme_sections.py) | bare | - | - |",
        "| [`new`](tests/test_readme_sections.py) "
        "| New, [Doe & Roe 2030](https://example.org/a), [Roe 2031](https://example.org/b) "
        "| conflict, loss scale | its parameters in the optimizer, all tasks at each step |",
    ]


def test_table_leaves_out_rules_of_other_packages():
    registry = Registry("loss balancer", "none")

    def rule(losses):
        return losses

    rule.__module__ = "other_package.rules"
    registry.register("other")(rule)
    assert len(readme_sections.methods_table(registry).splitlines()) == 2


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


@pytest.mark.parametrize("file", SECTIONS)
def test_missing_markers_are_named(file):
    section = list(SECTIONS[file])[-1]
    text = (ROOT / file).read_text(encoding="utf-8").replace(f"<!-- end of {section} -->", "")
    with pytest.raises(
        ValueError, match=f"^{file} must have the markers of the section '{section}' once, but has them 0 times"
    ):
        readme_sections.generated(text, SECTIONS[file], file)


def test_sections_that_differ_are_reported_and_written(tmp_path, monkeypatch, capsys):
    def text(content):
        return "before\n" + readme_sections.MARKED.format("tree", content) + "\nafter\n"

    monkeypatch.setattr(readme_sections, "ROOT", tmp_path)
    monkeypatch.setattr(readme_sections, "SECTIONS", {file: {"tree": lambda: "new"} for file in ("A.md", "B.md")})
    (tmp_path / "A.md").write_text(text("old"), encoding="utf-8")
    (tmp_path / "B.md").write_text(text("new"), encoding="utf-8")
    assert readme_sections.main([]) == 1
    assert capsys.readouterr().out == "A.md differs from the sources. Run python tests/readme_sections.py --write.\n"
    assert readme_sections.main(["--write"]) == 0
    assert [(tmp_path / file).read_text(encoding="utf-8") for file in ("A.md", "B.md")] == [text("new")] * 2
    assert readme_sections.main([]) == 0
