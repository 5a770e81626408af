"""Typed configuration -> Balancer. The only file of the library that knows omegaconf."""

from __future__ import annotations

import fnmatch
import inspect
from dataclasses import dataclass, field, make_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from balance import compose as compose_rules
from balance.messages import unknown
from balance.rules.registry import Registry, gradient_balancers, loss_balancers
from balance.stage.balancer import Balancer
from balance.types import EngineChoice, Heads, Memory, Scale, Source

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.nn import Parameter


@dataclass
class StageConfig:
    """How the stage composes its two rules; see `Balancer`."""

    source: Source = "parameters"
    heads: Heads | None = None
    scale: Scale = "paper"
    engine: EngineChoice = "auto"
    memory: Memory = "jacobian"
    measure: list[str] | None = None  # patterns of names of shared parameters, on which alone conflict is measured
    every: int = 1  # steps for which the gradient balancer's weights are used; see `balance.compose.every`
    smoothing: float = 0.0  # share of the average so far in a moving average of its weights
    groups: list[list[str]] | None = None  # tasks by group, for a gradient balancer between groups


def method_names(loss_method: str) -> list[str]:
    """Names of the loss balancers in a chain, which is written with plus signs.

    Raises:
        ValueError: If it is written with commas, which separate the methods of different runs.
    """
    if "," in loss_method:
        chain = loss_method.replace(",", "+").replace(" ", "")
        raise ValueError(f"A run has one loss_method, but got '{loss_method}'. To apply several in a chain, write {chain}.")
    return [name.strip() for name in loss_method.split("+")]


def options_schema(registry: Registry, name: str | None) -> type:
    """A dataclass with the options of a registered rule, their types and their defaults; empty for None.

    The seed is not among them: it belongs to the run.

    Raises:
        ValueError: If nothing has that name.
    """
    fields = []
    for option in registry.options(name).values() if name is not None else ():
        if option.name != "seed":
            default = MISSING if option.default is inspect.Parameter.empty else option.default
            shared = isinstance(default, list)  # a dataclass wants a new one each time
            made: Any = field(default_factory=partial(list, default)) if shared else field(default=default)
            fields.append((option.name, option.annotation, made))
    return make_dataclass(f"{name}_options", fields)


def compose(schema: object, settings: Mapping[str, Any], overrides: Iterable[str]) -> DictConfig:
    """Defaults, then settings, then ``key=value`` overrides: typed, and unknown keys are errors.

    Args:
        schema: A dataclass, or an instance of one.
        settings: What differs from the defaults, nested as in the schema.
        overrides: Such as ``"train.epochs=3"``; values are YAML.

    Raises:
        ValueError: If a key is unknown or a value has the wrong type; the message names the key.
    """
    config = OmegaConf.structured(schema)
    layers = [("The file", OmegaConf.create(dict(settings)))]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not (key and equals):
            raise ValueError(f"Overrides must read key=value, but got '{override}'.")
        try:
            layers.append((f"'{override}'", OmegaConf.from_dotlist([override])))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(f"'{override}' cannot be read: {_first_line(error)}") from None
    for origin, layer in layers:
        try:
            config = OmegaConf.merge(config, layer)
        except ConfigKeyError as error:
            raise ValueError(unknown("key", error.full_key, keys(config))) from None
        except OmegaConfBaseException as error:
            raise ValueError(f"{origin} does not fit '{error.full_key}': {_first_line(error)}.") from None
    assert isinstance(config, DictConfig)
    return config


def keys(config: DictConfig) -> list[str]:
    """All keys of a configuration, nested ones joined by dots."""
    return list(flatten(config))


def flatten(config: DictConfig) -> dict[str, Any]:
    """Leaves of a configuration by dotted key."""
    flat: dict[str, Any] = {}
    for key in map(str, config):
        value = None if OmegaConf.is_missing(config, key) else config[key]
        if isinstance(value, DictConfig):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return flat


def build_balancer(config: DictConfig, tasks: Sequence[str]) -> Balancer:
    """The stage that a configuration describes.

    Args:
        config: With keys ``loss_method``, ``gradient_method``, ``seed``, ``loss`` and ``gradient`` (options of the two),
            and ``balancer`` (`StageConfig`).
        tasks: Names of the tasks.

    Raises:
        ValueError: If a method or an option is unknown or out of range, or a mandatory option is missing.
        TypeError: If an option has the wrong type.
    """
    try:
        options = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ValueError(f"'{error.full_key}' has no default: give {error.full_key}=value.") from None
    assert isinstance(options, dict)
    stage, names = options["balancer"], method_names(config.loss_method)
    if stage.pop("measure") is not None:
        _check_measure(config.gradient_method, stage["source"])
    composed = {key: stage.pop(key) for key in ("groups", "smoothing", "every")}
    gradient, gradient_options = config.gradient_method, options["gradient"]
    if composed != {"groups": None, "smoothing": 0.0, "every": 1}:
        gradient = _composed(gradient, gradient_options, tuple(tasks), **composed)
        gradient_options = {}
    return Balancer(
        tuple(tasks),
        loss=names if len(names) > 1 else names[0],
        gradient=gradient,
        loss_options=options["loss"],
        gradient_options=gradient_options,
        seed=config.seed,
        **stage,
    )


def measured(shared: Mapping[str, Parameter], patterns: Sequence[str] | None) -> list[Parameter] | None:
    """The parameters on which conflict is measured; None if on all.

    Args:
        shared: The shared parameters by name.
        patterns: As on a command line: ``*`` stands for anything.

    Raises:
        ValueError: If no name fits a pattern.
    """
    if patterns is None:
        return None
    for pattern in patterns:
        if not fnmatch.filter(shared, pattern):
            raise ValueError(unknown("name in balancer.measure", pattern, tuple(shared)))
    return [p for name, p in shared.items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def _check_measure(gradient: str | None, source: Source) -> None:
    if gradient is None or gradient_balancers.sees(gradient) != "gramian":
        raise ValueError(f"balancer.measure needs a gradient method that gives weights, but got {gradient}.")
    if source != "parameters":
        raise ValueError(f"balancer.measure needs balancer.source=parameters, but got {source}.")


def _composed(
    name: str | None,
    options: dict[str, Any],
    tasks: tuple[str, ...],
    groups: list[list[str]] | None,
    smoothing: float,
    every: int,
) -> Any:
    if name is None:
        raise ValueError("balancer.groups, balancer.smoothing and balancer.every need a gradient method, but there is none.")
    if every != 1 and options.get("update_every", 1) != 1:
        raise ValueError(
            f"balancer.every must be the only option that reuses weights, but got balancer.every={every} and "
            f"gradient.update_every={options['update_every']}. Leave out gradient.update_every, which does the same."
        )
    if groups is None:
        rule: Any = compose_rules.every(1, name, len(tasks), **options)
    else:
        for task in (task for group in groups for task in group):
            if task not in tasks:
                raise ValueError(unknown("task in balancer.groups", task, tasks))
        indices = [[tasks.index(task) for task in group] for group in groups]
        rule = compose_rules.grouped(name, indices, len(tasks), **options)
    if smoothing:
        rule = compose_rules.smoothed(rule, smoothing, len(tasks))
    return compose_rules.every(every, rule, len(tasks)) if every != 1 else rule


def methods_schema(loss_method: str, gradient_method: str | None) -> tuple[type, type]:
    """Option schemas of a loss balancer, or a chain of them, and of a gradient balancer, by name."""
    names = method_names(loss_method)
    if len(names) == 1:
        loss = options_schema(loss_balancers, names[0])
    else:
        parts = {name: options_schema(loss_balancers, name) for name in names}
        loss = make_dataclass("chain_options", [(name, part, field(default_factory=part)) for name, part in parts.items()])
    return loss, options_schema(gradient_balancers, gradient_method)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
