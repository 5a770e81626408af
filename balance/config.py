"""Typed configuration of a `Balancer`. No other file of the library imports omegaconf."""

from __future__ import annotations

import fnmatch
import inspect
import operator
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from .messages import require_package, unknown

if find_spec("omegaconf") is None:
    require_package("omegaconf", "config")

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from .rules import compose as compose_rules
from .rules.registry import Registry, gradient_balancers, loss_balancers
from .rules.switch import Switch
from .stage.balancer import Balancer
from .stage.choices import check_metric
from .types import EngineChoice, GradientRule, Heads, Memory, Scale, Source

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch.nn import Parameter


T = TypeVar("T")
Metric = Literal["gradients", "optimizer"]

# Tests of a value against the entries of a field's metadata
_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": operator.ge,
    "above": operator.gt,
    "maximum": operator.le,
    "below": operator.lt,
    "choices": lambda value, choices: value in choices,
}


def setting(
    default: T,
    *,
    help: str = "",  # noqa: A002 - argparse's name for it
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: Collection[object] | None = None,
    remedy: str = "",
) -> T:
    """Declare an entry of a configuration in its dataclass, with its role and its range; see `check_settings`.

    Args:
        default: Default value. A list or a dict is copied for every instance.
        help: Role of the entry, in a few words.
        minimum: Least value of a number, or of every number in a list.
        above: Bound below all values.
        maximum: Greatest value.
        below: Bound above all values.
        choices: All possible values, where `typing.Literal` cannot list them.
        remedy: Advice for the error message, a sentence.

    Returns:
        A field of a dataclass, declared with the type of its default, as by `dataclasses.field`.
    """
    described = zip(("help", "remedy", *_TESTS), (help, remedy, minimum, above, maximum, below, choices), strict=True)
    metadata = {key: value for key, value in described if value not in (None, "")}
    if isinstance(default, list | dict):
        return cast("T", field(default_factory=partial(deepcopy, default), metadata=metadata))
    return field(default=default, metadata=metadata)


def check_settings(config: object, name: str = "") -> None:
    """Check that all entries of a configuration lie in the ranges that `setting` has declared; None is always valid.

    Args:
        config: An instance of a dataclass, or its form in omegaconf. Groups inside are checked too.
        name: Name of the configuration in messages, such as ``"data"``.

    Raises:
        ValueError: If a value lies outside its range; the message names the entry by its dotted key.
    """
    schema = OmegaConf.get_type(config) if OmegaConf.is_config(config) else type(config)
    if schema is None or not is_dataclass(schema):
        return
    for entry in fields(schema):
        if OmegaConf.is_config(config) and OmegaConf.is_missing(config, entry.name):
            continue
        value, key = getattr(config, entry.name), f"{name}.{entry.name}" if name else entry.name
        check_settings(value, key)
        numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if any(number is not None and not _in_range(number, entry.metadata) for number in numbers):
            remedy = f" {entry.metadata['remedy']}" if "remedy" in entry.metadata else ""
            raise ValueError(f"{key} must {_range_in_words(entry.metadata)}, but got {value}.{remedy}")


def _in_range(value: Any, metadata: Mapping[str, Any]) -> bool:
    """Return whether a value lies in the range of an entry; NaN lies in no range that has a bound."""
    return all(test(value, metadata[key]) for key, test in _TESTS.items() if key in metadata)


def _range_in_words(metadata: Mapping[str, Any]) -> str:
    """Return the range of an entry, to follow the word "must" in a message."""
    bounds = {key: metadata[key] for key in _TESTS if key in metadata}
    if "choices" in bounds:
        return f"be one of {', '.join(map(str, bounds['choices']))}"
    if bounds == {"above": 0}:
        return "be positive"
    if bounds == {"minimum": 0}:
        return "not be negative"
    words = {"minimum": "at least", "maximum": "at most"}
    return "be " + " and ".join(f"{words.get(key, key)} {bound}" for key, bound in bounds.items())


@dataclass
class StageConfig:
    """Options of the stage and of the composition of its two rules; see `Balancer`."""

    weights: dict[str, float] = setting({}, help="priorities of tasks by name, factors on their losses; 1 where left out")
    source: Source = setting("parameters", help="tensors at which conflict is measured")
    heads: Heads | None = setting(None, help="treatment of task-specific heads; null: as in the method's paper code")
    scale: Scale = setting("paper", help="scale of the gradient balancer's weights")
    engine: EngineChoice = setting("auto", help="backward passes one by one or in a batch")
    memory: Memory = setting("jacobian", help="task gradients or only their inner products in memory")
    metric: Metric = setting("gradients", help="inner products of gradients, or as the optimizer's steps change the losses")
    measure: list[str] | None = setting(None, help="patterns of names: only at these shared parameters is conflict measured")
    warmup: int = setting(0, minimum=0, help="number of steps with equal weights before the gradient balancer begins")
    every: int = setting(1, minimum=1, help="number of steps that use the same weights; see `balance.compose.every`")
    smoothing: float = setting(0.0, minimum=0, below=1, help="weight of the past in a moving average of the weights")
    groups: list[list[str]] | None = setting(None, help="names of the tasks of each group, if whole groups are balanced")


def method_names(loss_method: str) -> list[str]:
    """Return the names of the loss balancers in a chain.

    Args:
        loss_method: Names, joined by plus signs.

    Returns:
        At least one name, in the order of application.

    Raises:
        ValueError: If the names are joined by commas, which separate the methods of different runs.
    """
    if "," in loss_method:
        chain = loss_method.replace(",", "+").replace(" ", "")
        raise ValueError(f"A run has one loss_method, but got '{loss_method}'. To apply several in a chain, write {chain}.")
    return [name.strip() for name in loss_method.split("+")]


def options_schema(registry: Registry, name: str | None) -> type:
    """Return a dataclass with the options of a registered rule, their types and their defaults.

    Args:
        registry: Registry of the name.
        name: A registered name; None for a dataclass without options.

    Returns:
        A dataclass. The seed is left out, since it belongs to the run.

    Raises:
        ValueError: If the name is unknown.
    """
    options: list[tuple[str, Any, Any]] = []
    for option in registry.options(name).values() if name is not None else ():
        if option.name != "seed":
            default = MISSING if option.default is inspect.Parameter.empty else option.default
            options.append((option.name, option.annotation, setting(default)))
    return make_dataclass(f"{name}_options", options)


def compose(schema: object, settings: Mapping[str, Any], overrides: Iterable[str]) -> DictConfig:
    """Return defaults, then settings, then ``key=value`` overrides, typed and in range; unknown keys are errors.

    Args:
        schema: A dataclass, or an instance of one.
        settings: Values that differ from the defaults, nested as in the schema.
        overrides: Entries of the command line, such as ``"train.epochs=3"``; values are YAML.

    Returns:
        A configuration with all entries of the schema.

    Raises:
        ValueError: If a key is unknown, or a value has the wrong type or is out of range; the message names the key.
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
            config.merge_with(layer)
        except ConfigKeyError as error:
            raise ValueError(unknown("key", error.full_key, keys(config))) from None
        except OmegaConfBaseException as error:
            raise ValueError(f"{origin} does not fit '{error.full_key}': {_first_line(error)}.") from None
    assert isinstance(config, DictConfig)
    check_settings(config)
    return config


def keys(config: DictConfig) -> list[str]:
    """Return all keys of a configuration; a nested key is joined to its groups by dots."""
    return list(flatten(config))


def flatten(config: DictConfig) -> dict[str, Any]:
    """Return the leaves of a configuration by dotted key; a missing value is None."""
    flat: dict[str, Any] = {}
    for key in map(str, config):
        value = None if OmegaConf.is_missing(config, key) else config[key]
        if isinstance(value, DictConfig):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return flat


def build_balancer(config: DictConfig, tasks: Sequence[str]) -> Balancer:
    """Return the stage that a configuration describes.

    Args:
        config: Configuration with the keys ``loss_method``, ``gradient_method``, ``seed``, ``loss`` and ``gradient``, the
            options of the two methods, and ``balancer``, a `StageConfig`.
        tasks: Names of the tasks.

    Returns:
        A new stage. With ``balancer.metric=optimizer`` its ``metric`` is to be set to the optimizer.

    Raises:
        ValueError: If a method or an option is unknown or out of range, or a mandatory option is missing.
        TypeError: If an option has the wrong type.
    """
    try:
        options = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ValueError(f"'{error.full_key}' has no default. Give {error.full_key}=value.") from None
    assert isinstance(options, dict)
    stage, names = options["balancer"], method_names(config.loss_method)
    if stage.pop("measure") is not None:
        _check_measure(config.gradient_method, stage["source"])
    metric = stage.pop("metric")
    weights, steps = stage.pop("weights") or None, stage.pop("warmup")
    composed = {key: stage.pop(key) for key in ("groups", "smoothing", "every")}
    gradient, gradient_options = config.gradient_method, options["gradient"]
    if composed != {"groups": None, "smoothing": 0.0, "every": 1}:
        gradient = _composed(gradient, gradient_options, tuple(tasks), **composed)
        gradient_options = {}
    if steps:
        gradient, gradient_options = _after_warmup(gradient, gradient_options, steps)
    balancer = Balancer(
        tuple(tasks),
        loss=names if len(names) > 1 else names[0],
        gradient=gradient,
        loss_options=options["loss"],
        gradient_options=gradient_options,
        seed=config.seed,
        weights=weights,
        **stage,
    )
    if metric == "optimizer":  # which is built later, with the balancer's parameters
        check_metric(balancer.source, balancer.gradient_balancer)
    return balancer


def _after_warmup(gradient: str | GradientRule | None, options: Mapping[str, Any], steps: int) -> tuple[Switch, dict[str, Any]]:
    if gradient is None:
        raise ValueError("balancer.warmup needs a gradient method, but got none.")
    return compose_rules.warmup((gradient, options) if isinstance(gradient, str) else gradient, steps), {}


def measured(shared: Mapping[str, Parameter], patterns: Sequence[str] | None) -> list[Parameter] | None:
    """Return the parameters at which conflict is measured.

    Args:
        shared: The shared parameters by name.
        patterns: Patterns of names as on a command line, where ``*`` stands for anything.

    Returns:
        The parameters whose names fit a pattern; None for all parameters, if ``patterns`` is None.

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
        raise ValueError(f"balancer.measure needs a gradient method that returns weights, but got {gradient}.")
    if source != "parameters":
        raise ValueError(f"balancer.measure needs balancer.source=parameters, but got {source}.")


def _composed(
    name: str | None,
    options: dict[str, Any],
    tasks: tuple[str, ...],
    groups: list[list[str]] | None,
    smoothing: float,
    every: int,
) -> GradientRule:
    """Return the composition of a gradient balancer that the options of `StageConfig` describe."""
    if name is None:
        raise ValueError("balancer.groups, balancer.smoothing and balancer.every need a gradient method, but got none.")
    if groups is None:
        rule: GradientRule = compose_rules.every(1, name, len(tasks), **options)
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
    """Return the schemas of the options of a loss method, or of a chain joined by plus signs, and of a gradient method."""
    names = method_names(loss_method)
    if len(names) == 1:
        loss = options_schema(loss_balancers, names[0])
    else:
        parts = {name: options_schema(loss_balancers, name) for name in names}
        loss = make_dataclass("chain_options", [(name, part, field(default_factory=part)) for name, part in parts.items()])
    return loss, options_schema(gradient_balancers, gradient_method)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
