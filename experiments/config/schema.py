"""The typed configuration of a run: defaults, then the experiment's file, then the command line."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

import yaml
from omegaconf import OmegaConf

from balance.config import StageConfig, compose, flatten, method_names, methods_schema
from experiments.cli import values_by_key
from experiments.problems import base as experiments

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from omegaconf import DictConfig

    from experiments.problems.base import Experiment

# Blocks of an experiment's file that are not entries of the configuration
BLOCKS = ("methods", "on_disk", "paper")
AT_LEAST_ONE = ("batch_size", "eval_batch_size", "epochs", "step_epochs", "report_last")  # of train
POSITIVE = ("lr", "balancer_lr", "max_norm")
NOT_NEGATIVE = ("weight_decay", "warmup_steps", "num_workers", "patience", "min_lr")


@dataclass
class TrainConfig:
    """Optimization: Adam, with a learning rate of its own for parameters that the balancer owns.

    Both rates follow ``schedule``: they stay as they are; fall to zero along half a cosine; are multiplied by ``factor`` every
    ``step_epochs`` epochs; or so whenever the score by which epochs are chosen has not been better for more than ``patience``
    epochs, down to ``min_lr``. Before, they rise linearly over ``warmup_steps`` steps.
    """

    epochs: int = 20
    batch_size: int = 64
    eval_batch_size: int = 1000  # decides a result with protocol=paper alone, which averages metrics over batches
    num_workers: int = 0  # processes that read data; pay where files are read and `cost/waiting` is large
    lr: float = 1e-3
    balancer_lr: float = 0.025
    weight_decay: float = 0.0  # of the model: Adam's, which adds it to the gradient
    schedule: Literal["constant", "cosine", "step", "plateau"] = "constant"
    warmup_steps: int = 0
    step_epochs: int = 100
    factor: float = 0.5
    patience: int = 5
    min_lr: float = 0.0
    max_norm: float | None = None  # clip the gradient of the model, after the stage; protocol=paper: of its trunk
    report_last: int | None = None  # final metrics: mean over the tests of so many last epochs; None: the best epoch's test


@dataclass
class RunConfig:
    """One run. ``loss``, ``gradient``, ``data`` and ``model`` get the options of the methods and of the experiment.

    ``protocol``: ``sound``, or ``paper`` for the settings and the rules of the published codes.
    """

    experiment: str = "digits"
    loss_method: str = "ls"
    gradient_method: str | None = None
    seed: int = 0
    protocol: Literal["sound", "paper"] = "sound"
    output_dir: str = "runs"
    track: bool = True
    log_every: int = 10
    log_model: bool = True  # the network and its checkpoints, as artifacts
    system_metrics: bool = False  # use of processor, memory, disk and network
    device: str = "cpu"
    balancer: StageConfig = field(default_factory=StageConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def configure(overrides: Sequence[str]) -> DictConfig:
    """Defaults, then the experiment's file, then the command line.

    Args:
        overrides: Words of the form ``key=value``.

    Raises:
        ValueError: If a name or a key is unknown, or a value has the wrong type or is out of range.
        ModuleNotFoundError: If the experiment needs a library that is not installed.
    """
    choice = values_by_key(overrides)
    name = choice.get("experiment", RunConfig.experiment)
    experiment = experiments.find(name)
    of_experiment, of_methods = of_file(name, experiment, choice)
    loss_method = choice.get("loss_method", RunConfig.loss_method)
    gradient_method = choice.get("gradient_method")
    if gradient_method in ("none", "None", "null", ""):
        overrides = [*overrides, "gradient_method=null"]
        gradient_method = None
    names = method_names(loss_method)
    of_loss = of_methods.get(loss_method, {}) if len(names) == 1 else {part: of_methods.get(part, {}) for part in names}
    of_experiment |= {"loss": of_loss, "gradient": of_methods.get(gradient_method or "", {})}
    loss, gradient = methods_schema(loss_method, gradient_method)
    groups = {"loss": loss, "gradient": gradient, "data": experiment.DataConfig}
    if hasattr(experiment, "ModelConfig"):
        groups["model"] = experiment.ModelConfig
    parts = [(key, part, field(default_factory=part)) for key, part in groups.items()]
    config = compose(make_dataclass("Config", parts, bases=(RunConfig,)), of_experiment, overrides)
    check(flatten(config))
    return config


def of_file(name: str, experiment: Experiment, choice: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the experiment's file says for what was chosen, and the options of methods that suit the experiment, by method.

    Its block ``on_disk`` holds where the data set itself is read. With ``protocol=paper`` that holds too, and the block
    ``paper``, which may have ``methods`` of its own, with settings of the run that go with one of them.

    Raises:
        ValueError: If the experiment knows no such protocol, or the choice contradicts itself.
    """
    content = yaml.safe_load((experiments.FOLDER / name / "config.yaml").read_text(encoding="utf-8"))
    blocks = {block: content.pop(block, None) for block in BLOCKS}
    layers = [content]
    of_data = {entry.name for entry in fields(experiment.DataConfig)}
    on_disk = getattr(experiment, "ON_DISK", None)
    source = choice.get("data.source")
    if on_disk is not None and source is None and choice.get("data.path") not in (None, "null", ""):
        source = on_disk
        layers.append({"data": {"source": on_disk}})
    as_published = choice.get("protocol") == "paper"
    if on_disk is not None and (source == on_disk or as_published):
        layers.append(blocks["on_disk"] or {})
    if "data.protocol" in choice and choice["data.protocol"] != choice.get("protocol", RunConfig.protocol):
        raise ValueError(f"data.protocol follows protocol: give protocol={choice['data.protocol']} alone.")
    if as_published:
        if blocks["paper"] is None:
            raise ValueError(f"'{name}' has no protocol=paper, but protocol=sound alone.")
        of_methods = blocks["paper"].pop("methods", {})
        layers += [blocks["paper"], {"data": {"protocol": "paper"}} if "protocol" in of_data else {}]
        layers += [of_methods.get(choice.get(kind, ""), {}) for kind in ("loss_method", "gradient_method")]
    merged = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.create, layers)))
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}, blocks["methods"] or {}


def check(values: Mapping[str, Any]) -> None:
    """Refuse numbers that are out of range.

    Raises:
        ValueError: If one is.
    """
    for key, value in values.items():
        group, _, entry = key.rpartition(".")
        if value is None or group not in ("", "train"):
            continue
        if (key == "log_every" or entry in AT_LEAST_ONE) and value < 1:
            raise ValueError(f"{key} must be at least 1, but got {value}.")
        if entry in POSITIVE and not value > 0:
            remedy = " null turns clipping off." if entry == "max_norm" else ""
            raise ValueError(f"{key} must be positive, but got {value}.{remedy}")
        if entry in NOT_NEGATIVE and not value >= 0:
            raise ValueError(f"{key} must not be negative, but got {value}.")
    if not 0 < values["train.factor"] < 1:
        raise ValueError(f"train.factor must be between 0 and 1, but got {values['train.factor']}.")
    if (values["train.report_last"] or 0) > values["train.epochs"]:
        raise ValueError(
            f"train.report_last must be at most train.epochs={values['train.epochs']}, but got {values['train.report_last']}."
        )
