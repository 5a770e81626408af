"""Pages of the methods, which a build of the documentation generates. Nothing here needs Sphinx."""

import re
import sys
from pathlib import Path

import pytest

from balance import gradient_balancers, loss_balancers

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs/_ext"))

import method_facts
from docstrings import read
from method_claims import CLAIMS, claims_list, claims_table, verdict
from method_examples import command, snippet
from method_pages import SECTIONS, described, files, method_table, page, write

from experiments.config.layers import configure

METHODS = [(kind, name) for kind in ("loss", "gradient") for name in method_facts.names(kind)]
every_method = pytest.mark.parametrize(("kind", "name"), METHODS)


def sections(text):
    """Return the texts of a page by title."""
    pieces = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def test_every_method_of_the_library_has_a_page():
    assert {f"methods/{kind}/{name}.md" for kind, name in METHODS} == {path.as_posix() for path in files()}
    assert {"dwa", "uw"} <= set(method_facts.names("loss"))
    assert {"pcgrad", "mgda"} <= set(method_facts.names("gradient"))


@every_method
def test_a_page_has_all_sections(kind, name):
    found = sections(page(kind, name))
    assert tuple(found) == SECTIONS
    assert all(text.strip() for text in found.values())


@every_method
def test_every_option_has_a_meaning_and_every_argument_is_an_option(kind, name):
    meanings = read(described(kind, name)).entries("Args")
    for option in method_facts.options(kind, name):
        assert meanings.get(option.name), f"Describe {option.name} in the section Args of '{name}'."
        assert meanings[option.name] in page(kind, name)


@every_method
def test_docstring_has_a_source(kind, name):
    docstring = read(described(kind, name))
    assert docstring.summary.endswith(".") or docstring.body
    assert docstring.source
    if (loss_balancers if kind == "loss" else gradient_balancers).traits(name).paper:
        assert docstring.citation or "NVIDIA" in docstring.source, docstring.source


@every_method
def test_example_runs(kind, name):
    program = snippet(kind, name)
    assert max(map(len, program.splitlines())) <= 90
    assert program in page(kind, name)
    printed = []
    exec(
        compile(program, f"<example of {name}>", "exec"),
        {"__name__": "example", "print": lambda *values: printed.extend(values)},
    )
    assert printed[0].isfinite().all()


@every_method
def test_command_of_the_trainer_has_a_valid_configuration(kind, name):
    line = command(kind, name)
    assert line in page(kind, name)
    words = [word.removeprefix("--") for word in line.replace("\\\n", "").split()[2:]]
    config = configure(words)
    assert config[f"{kind}_method"] == name


@every_method
def test_page_shows_every_claim_with_its_counter_example(kind, name):
    text = sections(page(kind, name))["Claims"]
    for claim in CLAIMS[kind]:
        if verdict(kind, name, claim):
            assert f"- {claim.replace('_', ' ')}: " in text
    assert ("pmatrix" in text) == any(verdict(kind, name, claim) == "refuted" for claim in CLAIMS[kind])


def test_claims_of_pcgrad():
    text = sections(page("gradient", "pcgrad"))["Claims"]
    holding, refuted = text.split("**Refuted")
    assert "- at least one: No weight is below one." in holding
    assert "- conflict free: The direction has no negative inner product with any task gradient." in refuted
    assert r"J = \begin{pmatrix} 1 & 3 & 1 \\ -3 & 3 & -3 \\ 0 & -3 & 0 \end{pmatrix}" in refuted


def test_example_has_the_optimizer_that_the_docstring_recommends():
    assert "torch.optim.SGD(" in snippet("gradient", "config_momentum")
    assert "torch.optim.Adam(" in snippet("gradient", "nashmtl")


@every_method
def test_facts_have_no_empty_row(kind, name):
    assert all(value.strip(" -") for _, value in method_facts.facts(kind, name))


def test_facts_follow_the_registration():
    facts = dict(method_facts.facts("gradient", "moco"))
    assert "Fernando et al. 2023" in facts["paper"]
    assert "Jacobian" in facts["sees"]
    assert "`memory.rows` (K, P)" in facts["state in a checkpoint"]
    assert '`source="features"`' in facts["does not work with"]
    assert "no effect" in dict(method_facts.facts("gradient", "nashmtl"))["loss weights"]
    assert "`log_variances` (K,)" in dict(method_facts.facts("loss", "uw"))["state in a checkpoint"]
    assert "balancer.parameters()" in dict(method_facts.facts("loss", "uw"))["needs"]


@pytest.mark.parametrize(
    ("kind", "name", "sizes"),
    [("gradient", "pcgrad", "a random generator"), ("loss", "ls", "none"), ("gradient", "sam_gs", "(K + 1,)")],
)
def test_state_in_words(kind, name, sizes):
    assert sizes in method_facts.state_in_words(kind, name)


def test_words_for_remedies_and_needs_are_complete():
    for kind, name in METHODS:
        traits = method_facts.REGISTRIES[kind].traits(name)
        assert set(traits.remedies) <= set(method_facts.REMEDIES)
        assert set(traits.needs) <= set(method_facts.NEEDS)


def test_tables_have_all_methods():
    for kind in ("loss", "gradient"):
        for table in (method_table(kind, "methods/index"), claims_table(kind, "methods/claims")):
            rows = [line for line in table.splitlines() if line.startswith("| [`")]
            assert len(rows) == len(method_facts.names(kind))
            assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
        assert claims_list(kind, "methods/claims").count("\n: ") == len(CLAIMS[kind])


def test_unknown_kinds_are_errors():
    for content in (method_table, claims_table, claims_list):
        with pytest.raises(ValueError, match="must be for loss or gradient, but got 'losses'"):
            content("losses", "methods/index")


def test_pages_are_written_only_if_they_have_changed_and_old_pages_are_removed(tmp_path):
    write(tmp_path)
    file, old = tmp_path / "methods/loss/uw.md", tmp_path / "methods/loss/old.md"
    assert len(list(tmp_path.rglob("*.md"))) == len(METHODS)
    before = file.stat().st_mtime_ns
    old.write_text("# old\n", encoding="utf-8")
    file.with_name("dwa.md").write_text("# changed\n", encoding="utf-8")
    write(tmp_path)
    assert not old.exists()
    assert file.stat().st_mtime_ns == before
    assert file.with_name("dwa.md").read_text(encoding="utf-8") == page("loss", "dwa")


def test_methods_of_other_packages_have_no_page(monkeypatch):
    monkeypatch.setattr(loss_balancers, "_methods", dict(loss_balancers._methods))
    loss_balancers.register("of_a_user")(lambda losses: losses)
    assert "of_a_user" not in method_facts.names("loss")


def test_the_table_of_defects_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/methods/defects.md").read_text(encoding="utf-8")))
    assert len(named) >= 14
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", file.read_text("utf-8"))
    }
    assert named <= defined
