"""Generated tables of the reference, and the messages that it quotes. Nothing here needs Sphinx."""

import ast
import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs/_ext"))

import benchmark_tables
import configuration
from public_names import public_names

from experiments.config.schema import OPTIMIZERS, RunConfig
from experiments.problems import base as problems

PAGES = ROOT / "docs/reference"
FOREIGN = (  # messages of Python, with another package, and of torch
    "AttributeError",
    "NotImplementedError: Module [Balancer] is missing",
    "RuntimeError: Trying to backward through the graph a second time",
)


def messages():
    """Return the texts in the sources, with three dots for inserted values."""
    texts = []
    for folder in ("balance", "experiments"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(re.sub(r"\s+", " ", text) for text in texts)


def test_quoted_messages_are_in_the_sources():
    page = (PAGES / "errors.md").read_text(encoding="utf-8")
    quoted = [line for block in re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]
    assert len(quoted) >= 30
    sources = messages().lower()
    for line in quoted:
        if line.startswith(FOREIGN):
            continue
        for piece in re.split(r"…|\. |, (?:but )?", re.sub(r"^\w+(Error|Warning): ", "", line)):
            assert piece.strip(" '().,:?").lower() in sources, f"No message contains {piece!r}, which errors.md quotes."


def test_every_quoted_message_has_a_way_out():
    page = (PAGES / "errors.md").read_text(encoding="utf-8")
    for entry in re.split(r"^### ", page, flags=re.MULTILINE)[1:]:
        assert "```text" in entry
        assert "**Way out.**" in entry or "**Cause.**" in entry


def test_tables_of_the_configuration_have_all_entries():
    page = (PAGES / "configuration.md").read_text(encoding="utf-8")
    named = re.findall(r"\{configuration-table\} (\w+)", page)
    assert named == list(configuration.GROUPS)
    shown = "\n".join(map(configuration.group_table, named))
    nested = {"balancer", "train", "lbfgs"}
    for entry in fields(RunConfig):
        if entry.name not in nested:
            assert f"| `{entry.name}` |" in shown
    for group in nested:
        for entry in fields(RunConfig.__dataclass_fields__[group].default_factory):
            assert f"| `{group}.{entry.name}` |" in shown
    for schema in OPTIMIZERS.values():
        for entry in fields(schema):
            assert f"| `optimizer.{entry.name}` |" in shown
    assert "| `train.lr` | `0.001` | float > 0 | learning rate of the model |" in shown


def test_every_entry_has_a_meaning():
    for group in configuration.GROUPS:
        for line in configuration.group_table(group).splitlines():
            if line.startswith("| `"):
                assert re.split(r"(?<!\\)\|", line)[-2].strip(), line


def test_every_problem_has_a_section():
    text = configuration.problems_tables()
    assert re.findall(r"^### (\w+)$", text, flags=re.MULTILINE) == list(problems.names())
    assert "| `data.imbalance` | `1000.0` |" in text  # the problem's default, not the general one
    assert "`train.epochs=2`" in text  # of llm


@pytest.mark.parametrize("module", configuration.COMMANDS)
def test_tables_of_commands_have_all_options(module):
    shown = configuration.command_table(module)
    assert f"{{command-table}} {module}" in (PAGES / "command_line.md").read_text(encoding="utf-8")
    if module != "balance.__main__":
        parser = __import__(module, fromlist=["build_parser"]).build_parser()
        for action in parser._actions:
            assert all(f"`{option}" in shown for option in action.option_strings if option not in ("-h", "--help"))
        assert ("`--experiment=NAME`" in shown) == (module != "experiments.study")  # which has several problems
    else:
        assert "`python -m balance methods`" in shown


@pytest.mark.parametrize(("function", "name"), [(configuration.group_table, "trains"), (configuration.command_table, "train")])
def test_unknown_tables_are_errors(function, name):
    with pytest.raises(ValueError, match=f"must be one of .*but got '{name}'"):
        function(name)


@pytest.mark.parametrize("name", benchmark_tables.FORMS)
def test_benchmark_tables_are_made_of_the_newest_record(name):
    form = benchmark_tables.FORMS[name]
    files = sorted((ROOT / "benchmarks/results").glob(f"*_{form.record}_*.json"))
    shown = benchmark_tables.benchmark_table(name)
    assert f"Record `{files[-1].name}`: {files[-1].name[:10]}, x86_64" in shown
    record = json.loads(files[-1].read_text(encoding="utf-8"))
    assert f"torch {record['torch']}" in shown
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(lines) > 3
    assert len({line.count("|") for line in lines}) == 1


def test_ratios_are_those_of_the_record():
    shown = benchmark_tables.benchmark_table("llm")
    record = json.loads(benchmark_tables.recorded("llm", "json").read_text(encoding="utf-8"))["results"]
    first, second = (rows["nashmtl, collect()"] for rows in record.values())
    cells = [f"{row['ratio']:.2f} ({row['mib']:.1f} MiB)" for row in (first, second)]
    assert f"| nashmtl, collect() | {' | '.join(cells)} |" in shown
    assert "| step | checkpointing = False | checkpointing = True |" in shown
    assert "Common to all columns: K = " in shown


def test_benchmark_figure_is_the_newest():
    shown = benchmark_tables.benchmark_figure("jacobian", "choose/cost")
    figure = sorted((ROOT / "benchmarks/results").glob("*_jacobian_*.png"))[-1]
    assert f"](../../benchmarks/results/{figure.name})" in shown
    assert figure.with_suffix(".json").name in shown


def test_unknown_benchmarks_are_errors():
    with pytest.raises(ValueError, match="must be one of rules, steps"):
        benchmark_tables.benchmark_table("rule")
    with pytest.raises(ValueError, match="a record of the kind 'speed'"):
        benchmark_tables.recorded("speed", "json")


def test_public_names():
    names = set(public_names())
    assert {"balance.Balancer", "balance.compose.every", "balance.metrics.delta_m", "balance.tracking.Tracker"} <= names
    assert {"balance.types.Gramian", "balance.testing.check_loss_balancer", "balance.compare"} <= names
    assert not any(part.startswith("_") for name in names for part in name.split(".") if name != "balance.__version__")
