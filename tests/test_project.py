"""Files around the sources: version, citation, commands, workflows and hooks agree with each other."""

import re
from pathlib import Path

import pytest
import yaml

import balance

ROOT = Path(__file__).parents[1]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


MAKEFILE = text("Makefile")
TARGETS = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)[0].split()
CLASSIFIERS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text("pyproject.toml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_citation_is_valid():
    """The keys and values that the schema of version 1.2.0 demands, and those that this project uses."""
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] in {"software", "dataset"}
    assert all(isinstance(citation[key], str) and citation[key] for key in ("message", "title", "abstract", "license"))
    assert citation["authors"]
    assert all("name" in author or "family-names" in author for author in citation["authors"])
    assert len(set(citation["keywords"])) == len(citation["keywords"])
    for key in ("repository-code", "url"):
        assert f'"{citation[key]}"' in text("pyproject.toml")
    known = {"cff-version", "message", "title", "abstract", "type", "authors", "version", "license", "repository-code", "url"}
    assert set(citation) <= known | {"keywords", "date-released", "doi"}


def test_version_is_one():
    assert yaml.safe_load(text("CITATION.cff"))["version"] == balance.__version__
    headings = re.findall(r"^## \[(.*?)\](.*)$", text("CHANGELOG.md"), flags=re.MULTILINE)
    released = [heading for heading in headings if heading != ("Unreleased", "")]
    assert headings[0] in (("Unreleased", ""), *released[:1])
    for number, date in released:
        assert re.fullmatch(r"\d+\.\d+\.\d+", number)
        assert re.fullmatch(r" - \d{4}-\d\d-\d\d", date)
    assert not released or released[0][0] == balance.__version__


def test_every_command_is_explained():
    for target in TARGETS:
        assert re.search(rf"^{target}:.*  ## ", MAKEFILE, flags=re.MULTILINE), target


def test_contributing_names_commands_that_exist():
    named = set(re.findall(r"`make ([\w-]+)`", text("CONTRIBUTING.md")))
    assert named
    assert named <= set(TARGETS)


def test_clean_removes_everything_that_is_ignored():
    recipe = MAKEFILE.partition("\nclean:")[2].partition("\n\n")[0]
    for pattern in text(".gitignore").split():
        assert pattern.strip("/") in recipe, pattern


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_uses_the_commands_and_constraints_of_the_project(workflow):
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    assert jobs
    content = workflow.read_text(encoding="utf-8")
    assert set(re.findall(r"run: make ([\w-]+)", content)) <= set(TARGETS)
    assert "pip install" not in content
    for name in re.findall(r"constraints: (\S+\.txt)", content):
        assert (ROOT / name).exists()


def test_matrix_has_the_supported_versions_of_python():
    matrix = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == CLASSIFIERS
    assert f'requires-python = ">={CLASSIFIERS[0]}"' in text("pyproject.toml")


def test_oldest_versions_are_the_lower_bounds():
    project = text("pyproject.toml").partition("dependencies = ")[2].partition("\n")[0]
    bounds = dict(re.findall(r'"(\w+)>=([\d.]+)"', project))
    assert set(bounds) == {"torch", "scipy"}
    for name, bound in bounds.items():
        (pinned,) = re.findall(rf"^{name}==([\d.]+)$", text("constraints-oldest.txt"), flags=re.MULTILINE)
        assert f"{pinned}.".startswith(f"{bound}.")
    install = text("docs/start/install.md")
    assert f"PyTorch {bounds['torch']} or newer, and SciPy {bounds['scipy']} or newer" in install
    assert f"Python {CLASSIFIERS[0]} or newer" in install


def test_hooks_pin_no_version():
    """Hooks run the tools that `make lint` installs, with the versions in constraints.txt."""
    (source,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert source["repo"] == "local"
    lint = MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0]
    for hook in source["hooks"]:
        tool = hook["entry"].removeprefix(".venv/bin/").split(" --")[0]
        assert hook["language"] == "system"
        assert tool in lint
