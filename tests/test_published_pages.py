"""The page with a command for every row of the published tables. Nothing here needs Sphinx."""

import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

from balance import gradient_balancers, loss_balancers
from balance.config import flatten

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs/_ext"))

import published_rows

from experiments import sweep
from experiments.analysis import published_tables
from experiments.cli import all_overrides, parse_seeds
from experiments.config.layers import configure
from tests.commands import NEEDS, check

PAGE = "experiments/published"
TABLES = {name: published_tables.load(name) for name in published_tables.names()}
PARSER = sweep.build_parser()
REGISTERED = published_tables.registered_methods()
LABELS = {label for table in TABLES.values() for label in table.methods}
COMMANDS = [
    pytest.param(table, label, command, id=f"{name}-{label}")
    for name, table in TABLES.items()
    for label in table.methods
    if (command := published_rows.row_command(table, label)) is not None
]
every_table = pytest.mark.parametrize("name", TABLES)


def page():
    return (ROOT / "docs" / f"{PAGE}.md").read_text(encoding="utf-8")


@cache
def rows(name):
    """The cells of a table of the page, by the label of the row."""
    lines = published_rows.published_table(name, PAGE).splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]
    return {re.sub(r"\[(.*)\]\(.*\)", r"\1", row[0]): row for row in cells}


def configured(table, command):
    """The configuration of a command of the sweep, and its options."""
    pytest.importorskip(NEEDS.get(table.experiment, "torch"))
    program, script, *words = shlex.split(command)
    assert (program, script) == ("python", "experiments/sweep.py")
    options = PARSER.parse_intermixed_args(words)
    return configure(all_overrides(options)), options


def text_settings(config):
    return {key: str(value) for key, value in flatten(config).items()}


def test_page_has_every_table_and_the_generated_parts():
    named = re.findall(r"^```\{published-table\} (\w+)\n```", page(), flags=re.MULTILINE)
    assert sorted(named) == sorted(TABLES)
    assert "```{published-overview}\n```" in page()
    assert "```{published-rules}\n```" in page()
    assert f"](#{published_rows.RULES})" in page()
    assert "\n## Differences of the rules\n" in page()


def test_page_is_linked():
    folder = ROOT / "docs/experiments"
    assert re.search(r"```\{toctree\}.*^published$", (folder / "index.md").read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert "](published.md)" in (folder / "reproducing_papers.md").read_text("utf-8")
    assert '"published_rows"' in (ROOT / "docs/conf.py").read_text("utf-8")


@every_table
def test_every_row_is_on_the_page_with_its_number_and_a_command_or_a_reason(name):
    shown = rows(name)
    assert list(shown) == [*TABLES[name].methods, "single-task networks"]
    for label, row in TABLES[name].methods.items():
        number = row.delta_m or row.metrics.get("all/success")
        if number:
            assert float(shown[label][1].split(" ")[0]) == number.value
        assert shown[label][2] == row.source
        assert re.fullmatch(r"`python experiments/sweep\.py .*`|none: .+", shown[label][-1]), shown[label]
        assert len(shown[label]) == 6


@pytest.mark.parametrize(("table", "label", "command"), COMMANDS)
def test_command_of_a_row_trains_its_method_in_the_setting_of_the_table(table, label, command):
    config, options = configured(table, command)
    assert (config.loss_method, config.gradient_method) == REGISTERED[label.split(", ")[0]]
    assert config.protocol == "paper"
    settings = text_settings(config)
    assert table.differences(settings) == {}
    assert table.has_data_of(settings) == bool(table.elsewhere)  # metaworld: never
    assert len(parse_seeds(options.seeds)) == (10 if table.experiment == "metaworld" else 3)
    assert options.no_baselines  # delta_m is against the published networks


def test_a_command_in_another_setting_would_be_found():
    command = published_rows.row_command(TABLES["quantum_chemistry_retuned"], "FAMO")
    config, _ = configured(TABLES["quantum_chemistry"], command)
    different = TABLES["quantum_chemistry"].differences(text_settings(config))
    assert different == {"train.batch_size": ("60", "120"), "train.patience": ("10", "5")}
    config, _ = configured(TABLES["nyuv2"], "python experiments/sweep.py --experiment=nyuv2 --loss_method=famo")
    assert not TABLES["nyuv2"].has_data_of(text_settings(config))


@every_table
def test_other_commands_of_a_table_are_accepted(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    table = TABLES[name]
    pytest.importorskip(NEEDS.get(table.experiment, "torch"))
    for command in (
        next(filter(None, (published_rows.row_command(table, label) for label in table.methods))),
        published_rows.single_task_command(table),
        published_rows.compare_command(table),
    ):
        check(command)


def test_rows_without_a_command_name_methods_that_are_not_registered():
    with_command = {parameters.values[1] for parameters in COMMANDS}
    assert LABELS - with_command == set(published_rows.NOT_HERE)
    names = {*loss_balancers.names(), *gradient_balancers.names(), *REGISTERED}
    registered = {re.sub(r"\W|_", "", name).lower() for name in names}
    assert "nashmtl" in registered
    assert not {re.sub(r"\W|_", "", label).lower() for label in published_rows.NOT_HERE} & registered


def test_a_method_that_becomes_registered_gets_a_command(monkeypatch):
    methods = REGISTERED | {"NTKMTL": ("ls", "ntk")}
    monkeypatch.setattr(published_rows, "pairs", lambda: methods)
    assert "--gradient_method=ntk" in rows.__wrapped__("nyuv2")["NTKMTL"][-1]


def test_a_row_with_neither_method_nor_reason_is_an_error(monkeypatch):
    monkeypatch.delitem(published_rows.NOT_HERE, "IMGrad")
    with pytest.raises(ValueError, match="The row 'IMGrad' must have a registered method or a reason"):
        published_rows.published_table("nyuv2", PAGE)


def test_variants_and_options_of_a_row():
    assert published_rows.method_of("SI") == ("scaleinvls", None, ())
    assert published_rows.method_of("IMTL-G") == ("ls", "imtl", ("gradient.official=true",))
    assert published_rows.method_of("Nash-MTL, every 50, reproduced") == ("ls", "nashmtl", ("balancer.every=50",))
    with pytest.raises(ValueError, match="must be 'reproduced' or 'every N', but got 'twice'"):
        published_rows.method_of("Nash-MTL, twice")


def test_numbers_of_some_rows():
    assert rows("nyuv2")["FAMO"][1] == "-4.10 ± 0.39"
    assert rows("nyuv2")["IMTL-G"][1] == "-0.76 (-0.60)"
    assert rows("cityscapes")["MoDo"][1] == "(18.94)"  # no delta_m is printed
    assert rows("metaworld")["single-task networks"][1] == "0.90 ± 0.03"


def test_runs_on_the_data_of_the_project_are_linked_without_numbers():
    link = "[rooms](../experiments/results.md#rooms)"
    linked = {label for label, row in rows("nyuv2").items() if row[3] == link}
    assert linked == {"LS", "UW", "PCGrad", "CAGrad", "IMTL-G", "Nash-MTL", "FAMO", "GO4Align"}
    assert {label for label, row in rows("metaworld").items() if row[3] != "-"} == {"LS", "PCGrad", "FAMO"}
    assert {row[3] for name in ("celeba", "quantum_chemistry_retuned") for row in rows(name).values()} == {"-"}
    with pytest.raises(ValueError, match="rows in a section 'Room'"):
        published_rows.recorded("Room")


def test_differences_are_the_comments_of_the_problem_and_the_docstrings_of_the_rules():
    assert published_rows.setting_differences("celeba").startswith("The parameters of UW are trained")
    assert published_rows.setting_differences("cityscapes") == published_rows.setting_differences("nyuv2") != ""
    assert rows("celeba")["UW"][4] == "below"
    assert rows("nyuv2")["UW"][4] == "-"
    assert rows("metaworld")["FAMO"][4] == f"[rule](#{published_rows.RULES}), below"
    shown = published_rows.rules_table("", PAGE)
    assert "| [RLW](../methods/loss/rlw.md) | Draws come from a separate generator, on the host. |" in shown
    assert ":math:" not in shown
    assert "``" not in shown


def test_overview_counts_rows():
    shown = published_rows.overview()
    for table in TABLES.values():
        commands = [published_rows.row_command(table, label) for label in table.methods]
        assert f" | {len(commands)} | {len(commands) - commands.count(None)} | " in shown
    assert "| NYUv2 | 21 | 19 | NTKMTL, IMGrad | rooms |" in shown


def test_results_that_the_page_quotes_are_those_of_the_results():
    quoted = re.findall(r"\d[\d.]* ± [\d.]*\d", page())
    assert len(quoted) >= 6
    results = (ROOT / "docs/experiments/results.md").read_text(encoding="utf-8")
    assert [number for number in quoted if number not in results] == []
