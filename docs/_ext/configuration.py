"""Tables of the entries of a run's configuration, and of the options of the commands."""

from __future__ import annotations

import argparse
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING

from generated import add_directive, table
from omegaconf import OmegaConf

from balance.config import StageConfig, flatten
from experiments.config.description import entries
from experiments.config.layers import configure
from experiments.config.schema import AdamConfig, LBFGSConfig, RunConfig, SGDConfig, TrainConfig
from experiments.problems import base as problems

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from omegaconf import DictConfig
    from sphinx.application import Sphinx

    from experiments.config.description import Entry

GROUPS = {  # prefix of the keys, and the dataclass
    "run": ("", RunConfig),
    "balancer": ("balancer.", StageConfig),
    "train": ("train.", TrainConfig),
    "adam": ("optimizer.", AdamConfig),
    "sgd": ("optimizer.", SGDConfig),
    "lbfgs": ("lbfgs.", LBFGSConfig),
}
COMMANDS = {  # words that start a command, by the module of its parser
    **{
        f"experiments.{name}": f"python experiments/{name}.py"
        for name in ("trainer", "sweep", "study", "compare", "diagnose", "baselines", "front")
    },
    "balance.__main__": "python -m balance",
}


def group_table(group: str, docname: str = "") -> str:  # noqa: ARG001 - directives give the page
    """Return the table of a group of entries: key, default, range and role.

    Raises:
        ValueError: If the group is unknown.
    """
    if group not in GROUPS:
        raise ValueError(f"configuration-table must be one of {', '.join(GROUPS)}, but got '{group}'.")
    prefix, schema = GROUPS[group]
    own = {prefix + entry.name for entry in fields(schema)}  # entries of groups inside are in other tables
    return rows(entry for entry in entries(OmegaConf.structured(schema), prefix) if entry.key in own)


def rows(listed: Iterable[Entry]) -> str:
    """Return the table of some entries."""
    cells = [[f"`{entry.key}`", f"`{entry.value}`", entry.range, entry.role] for entry in listed]
    return f":::{{container}} wide-table\n{table(['key', 'default', 'range', 'meaning'], cells)}\n:::"


def problems_tables(_: str = "", docname: str = "") -> str:  # noqa: ARG001
    """Return a section for each problem: its data, its network, and its settings that differ from the general defaults."""
    return "\n\n".join(part for name in problems.names() for part in problem_section(name))


def problem_section(name: str) -> Iterator[str]:
    """Yield the parts of the section of a problem."""
    yield f"### {name}"
    yield problems.summaries()[name]
    try:
        config = configure([f"experiment={name}"])
    except ModuleNotFoundError as error:
        yield f"The table needs packages that were missing when this page was made. {error}"
        return
    if listed := [entry for entry in entries(config) if entry.key.startswith(("data.", "model."))]:
        yield rows(listed)
    if changes := differences(config):
        yield f"Other defaults of this problem: {', '.join(f'`{key}={value}`' for key, value in changes.items())}."


def differences(config: DictConfig) -> dict[str, object]:
    """Return the entries of general groups whose value in a problem's configuration is not the general default."""
    general = flatten(OmegaConf.structured(RunConfig))
    here = flatten(config)
    return {
        key: here[key]
        for key, value in general.items()
        if key in here and here[key] != value and key != "experiment" and not isinstance(value, dict)
    }


def command_table(module: str, docname: str = "") -> str:  # noqa: ARG001
    """Return the description, the usage and the options of a command.

    Raises:
        ValueError: If the module is no command.
    """
    if module not in COMMANDS:
        raise ValueError(f"command-table must be one of {', '.join(COMMANDS)}, but got '{module}'.")
    parser = import_module(module).build_parser()
    return "\n\n".join(command_parts(parser, COMMANDS[module]))


def command_parts(parser: argparse.ArgumentParser, program: str) -> Iterator[str]:
    """Yield the paragraphs about a parser, and about the parsers of its sub-commands."""
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if subparsers:
        for name, inner in subparsers[0].choices.items():
            yield from command_parts(inner, f"{program} {name}")
        return
    parser.prog = program
    if parser.description:
        sentence = " ".join(parser.description.split()).rstrip(".")
        yield f"{sentence[0].upper()}{sentence[1:]}."
    if example := (parser.epilog or "").partition("\n")[2].strip():
        yield f"```bash\n{example}\n```"
    cells = [[invocation(action), meaning(parser, action)] for action in parser._actions if action.dest != "help"]
    yield f":::{{container}} wide-table\n{table([f'`{program}`', 'meaning'], cells)}\n:::"


def invocation(action: argparse.Action) -> str:
    """Return an option as it is written on a command line."""
    value = action.metavar or ("" if action.nargs == 0 else f"{{{','.join(map(str, action.choices or ()))}}}")
    if not action.option_strings:
        return f"`{action.metavar or action.dest}{' ...' if action.nargs == '*' else ''}`"
    return f"`{action.option_strings[-1]}{f'={value}' if value and action.nargs != 0 else ''}`"


def meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return the help of an option, with its default filled in."""
    return parser._get_formatter()._expand_help(action) if action.help else ""


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives ``configuration-table``, ``problem-tables`` and ``command-table``."""
    add_directive(app, "configuration-table", group_table)
    add_directive(app, "problem-tables", problems_tables)
    add_directive(app, "command-table", command_table)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
