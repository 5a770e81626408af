"""Layers of a run's configuration, each of which overrides the layers before it.

    defaults < problem's file < its block on_disk < its block paper < command line

The block ``on_disk`` applies where the data set itself is read, the block ``paper`` with ``protocol=paper``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from balance.config import compose, method_names
from experiments.config.schema import RunConfig, TrainConfig, config_schema, last_epoch
from experiments.problems import base as problems

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from omegaconf import DictConfig

    from experiments.problems.base import Problem

Settings = dict[str, Any]  # nested as the configuration is

AUTO = "auto"  # method that a diagnosis chooses when a run starts
NO_METHOD = ("none", "None", "null", "")  # words for no gradient method on a command line


class ProblemFile(NamedTuple):
    """Blocks of a problem's ``config.yaml``."""

    settings: Settings
    methods: Settings  # options of methods that suit the problem, by the name of the method
    on_disk: Settings
    paper: Settings | None  # None: no published protocol
    paper_methods: Settings  # settings of a run in the published protocol, by the name of one of its methods


def configure(overrides: Sequence[str]) -> DictConfig:
    """Return the typed configuration of a run.

    Args:
        overrides: Words of the form ``key=value``.

    Raises:
        ValueError: If a name or a key is unknown, a value has the wrong type or is out of range, or two values contradict
            each other.
        ModuleNotFoundError: If the problem needs a library that is not installed.
    """
    values = values_by_key(overrides)
    name = values.get("experiment", RunConfig.experiment)
    problem, file = problems.find(name), read_file(name)
    loss_method = values.get("loss_method", RunConfig.loss_method)
    gradient_method = values.get("gradient_method")
    if gradient_method in NO_METHOD:
        gradient_method, overrides = None, [*overrides, "gradient_method=null"]
    check_not_automatic(loss_method, gradient_method)
    check_protocol(name, file, values)
    settings = merge(file.settings, *on_disk_layers(problem, file, values), *paper_layers(problem, file, values))
    options = method_options(file, loss_method, gradient_method)
    optimizer = values.get("train.optimizer", settings.get("train", {}).get("optimizer", TrainConfig.optimizer))
    config = compose(config_schema(problem, loss_method, gradient_method, optimizer), settings | options, overrides)
    check_report_last(config)
    check_optimizer(config)
    check_lbfgs(config)
    return config


def values_by_key(overrides: Sequence[str]) -> dict[str, str]:
    """Return overrides as a dict; the last value of a key counts.

    Raises:
        ValueError: If an override does not have the form ``key=value``.
    """
    for override in overrides:
        if not override.partition("=")[0] or "=" not in override:
            raise ValueError(f"Overrides must read key=value, but got '{override}'.")
    return {key: value for key, _, value in (override.partition("=") for override in overrides)}


def read_file(name: str) -> ProblemFile:
    """Read the ``config.yaml`` of a problem."""
    content = yaml.safe_load((problems.FOLDER / name / "config.yaml").read_text(encoding="utf-8"))
    methods, on_disk, paper = (content.pop(block, None) for block in ("methods", "on_disk", "paper"))
    paper_methods = paper.pop("methods", {}) if paper is not None else {}
    return ProblemFile(content, methods or {}, on_disk or {}, paper, paper_methods)


def on_disk_layers(problem: Problem, file: ProblemFile, values: Mapping[str, str]) -> list[Settings]:
    """Return the layers for the data set itself, which ``data.path``, ``data.source`` or ``protocol=paper`` select."""
    on_disk = problem.ON_DISK
    if on_disk is None:
        return []
    implied = "data.source" not in values and values.get("data.path", "null") not in ("null", "")
    reads_data_set = implied or values.get("data.source") == on_disk
    layers: list[Settings] = [{"data": {"source": on_disk}}] if implied else []
    return [*layers, file.on_disk] if reads_data_set or is_paper(values) else layers


def paper_layers(problem: Problem, file: ProblemFile, values: Mapping[str, str]) -> list[Settings]:
    """Return the layers for the published protocol and for the chosen methods in it."""
    if not is_paper(values) or file.paper is None:
        return []
    follows = any(entry.name == "protocol" for entry in fields(problem.DataConfig))
    chosen = [file.paper_methods.get(values.get(kind, ""), {}) for kind in ("loss_method", "gradient_method")]
    return [file.paper, {"data": {"protocol": "paper"}} if follows else {}, *chosen]


def method_options(file: ProblemFile, loss_method: str, gradient_method: str | None) -> Settings:
    """Return the options that the problem's file has for the two methods, as the groups ``loss`` and ``gradient``."""
    names = method_names(loss_method)
    options = {name: file.methods.get(name, {}) for name in names}
    loss = options if len(names) > 1 else options[names[0]]
    return {"loss": loss, "gradient": file.methods.get(gradient_method or "", {})}


def merge(*layers: Settings) -> Settings:
    """Return nested settings in which a later layer overrides an earlier one."""
    merged = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.create, layers)))
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def is_paper(values: Mapping[str, str]) -> bool:
    """Return whether the command line selects the published protocol."""
    return values.get("protocol") == "paper"


def check_not_automatic(*methods: str | None) -> None:
    """Check that no method is ``auto``.

    Raises:
        ValueError: If one is.
    """
    if AUTO in methods:
        raise ValueError(
            "loss_method and gradient_method must be names here, but got auto, with which only trainer.py starts a run. "
            "diagnose.py prints the methods that auto would choose."
        )


def check_protocol(name: str, file: ProblemFile, values: Mapping[str, str]) -> None:
    """Check that the problem has the protocol, and that the data follow it.

    Raises:
        ValueError: If the problem has no published protocol, or ``data.protocol`` differs from ``protocol``.
    """
    if "data.protocol" in values and values["data.protocol"] != values.get("protocol", RunConfig.protocol):
        raise ValueError(
            f"data.protocol must equal protocol, but got {values['data.protocol']}. Set protocol, which sets both."
        )
    if is_paper(values) and file.paper is None:
        raise ValueError(f"protocol must be sound for '{name}', which has no published protocol, but got paper.")


def check_report_last(config: DictConfig) -> None:
    """Check that as many epochs are trained as are reported.

    Raises:
        ValueError: If ``train.report_last`` exceeds the number of epochs and steps of LBFGS.
    """
    train, reported = config.train, config.train.report_last
    if reported is not None and reported > last_epoch(train):
        steps = f" + train.lbfgs_steps={train.lbfgs_steps}" if train.lbfgs_steps else ""
        raise ValueError(f"train.report_last must be at most train.epochs={train.epochs}{steps}, but got {reported}.")


def check_optimizer(config: DictConfig) -> None:
    """Check options of the optimizer that depend on each other.

    Raises:
        ValueError: If Adam has not two decays, or Nesterov's momentum has no momentum or a dampening.
    """
    options = config.optimizer
    if "betas" in options and len(options.betas) != 2:
        raise ValueError(f"optimizer.betas must be two numbers, but got {options.betas}.")
    if options.get("nesterov") and (options.momentum == 0 or options.dampening != 0):
        raise ValueError(
            f"optimizer.nesterov needs momentum and no dampening, but got momentum={options.momentum} and "
            f"dampening={options.dampening}. Set optimizer.momentum=0.9 optimizer.dampening=0."
        )


def check_lbfgs(config: DictConfig) -> None:
    """Check that the precision suits the steps of LBFGS, if there are any.

    Raises:
        ValueError: If the precision is too low for a line search.
    """
    train = config.train
    if train.lbfgs_steps and train.precision != "fp32":
        raise ValueError(
            f"train.precision must be fp32 for the steps of LBFGS, but got {train.precision}. Or set train.lbfgs_steps=0."
        )
