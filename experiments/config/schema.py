"""Typed entries of a run's configuration, with their defaults, ranges and roles."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from balance.config import StageConfig, methods_schema, setting
from experiments.problems.base import ProtocolName

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from experiments.problems.base import Problem


OptimizerName: TypeAlias = Literal["adam", "adamw", "sgd"]
Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]


@dataclass
class AdamConfig:
    """Options of `torch.optim.Adam` and `torch.optim.AdamW`."""

    betas: list[float] = setting([0.9, 0.999], minimum=0, below=1, help="decay of the averages of gradients and of squares")
    eps: float = setting(1e-8, minimum=0, help="number that is added to the denominator")


@dataclass
class SGDConfig:
    """Options of `torch.optim.SGD`."""

    momentum: float = setting(0.0, minimum=0, below=1, help="share of the last update in an update")
    dampening: float = setting(0.0, minimum=0, below=1, help="reduction of the gradient's share in the momentum")
    nesterov: bool = setting(default=False, help="Nesterov's momentum, which needs momentum and no dampening")


OPTIMIZERS: dict[str, type] = dict(zip(get_args(OptimizerName), (AdamConfig, AdamConfig, SGDConfig), strict=True))


@dataclass
class LBFGSConfig:
    """Steps of LBFGS that follow the epochs, all on one batch. Decay of the weights and clipping are the epochs' only."""

    samples: int | None = setting(None, minimum=1, help="training samples in the batch of LBFGS; null: all of them")
    max_iter: int = setting(20, minimum=1, help="iterations of a step, each with at least one evaluation of the losses")
    history_size: int = setting(50, minimum=1, help="pairs of a step and a change of the gradient that LBFGS remembers")
    lr: float = setting(1.0, above=0, help="first length that the line search tries, and the fixed length without it")
    line_search: Literal["strong_wolfe", "none"] = setting("strong_wolfe", help="search of the length of an iteration")
    tolerance_grad: float = setting(1e-9, minimum=0, help="largest entry of the gradient at which a step ends")
    tolerance_change: float = setting(1e-12, minimum=0, help="change of parameters or loss at which a step ends")


@dataclass
class TrainConfig:
    """Optimization, with a separate learning rate for parameters that the balancer owns.

    Both rates follow ``schedule``. ``constant`` keeps them, and ``cosine`` lowers them to zero along half a cosine. ``step``
    multiplies them by ``factor`` every ``step_epochs`` epochs. ``plateau`` does so, down to ``min_lr``, when the score that
    selects the epoch has not improved for more than ``patience`` epochs. Over the first ``warmup_steps`` steps they rise
    linearly.
    """

    epochs: int = setting(20, minimum=1, help="passes over the training data")
    lbfgs_steps: int = setting(
        0, minimum=0, help="steps of LBFGS after the epochs, each with fixed weights of the losses; a step counts as an epoch"
    )
    batch_size: int = setting(64, minimum=1, help="training samples of a step")
    eval_batch_size: int = setting(1000, minimum=1, help="samples of a test batch; protocol=paper averages over batches")
    micro_batches: bool = setting(
        default=True, help="compute the micro-batches of a batch one after the other, for problems that have them, not together"
    )
    num_workers: int = setting(0, minimum=0, help="processes that read data; useful where `cost/waiting` is large")
    threads: int | None = setting(
        None,
        minimum=1,
        help="threads of torch on the CPU; null: as torch chooses, and in a sweep the cores divided by the runs at a time",
    )
    precision: Precision = setting("fp32", help="numbers of the training steps; fp16 scales the losses")
    optimizer: OptimizerName = setting("adam", help="optimizer; its options are the entries of the group optimizer")
    lr: float = setting(1e-3, above=0, help="learning rate of the model")
    balancer_lr: float = setting(0.025, above=0, help="learning rate of the balancer's parameters")
    weight_decay: float = setting(0.0, minimum=0, help="weight decay of the model, added to the gradient; separate in adamw")
    schedule: Literal["constant", "cosine", "step", "plateau"] = setting("constant", help="course of the learning rates")
    warmup_steps: int = setting(0, minimum=0, help="steps of the linear rise of the learning rates")
    step_epochs: int = setting(100, minimum=1, help="epochs between two drops of schedule=step")
    factor: float = setting(0.5, above=0, below=1, help="factor of a drop of schedule=step or schedule=plateau")
    patience: int = setting(5, minimum=0, help="epochs without improvement that schedule=plateau tolerates")
    min_lr: float = setting(0.0, minimum=0, help="least learning rate of schedule=plateau")
    max_norm: float | None = setting(
        None,
        above=0,
        help="norm to which the gradient of the model is clipped, after the stage; protocol=paper: the gradient of its trunk",
        remedy="null turns clipping off.",
    )
    report_last: int | None = setting(
        None, minimum=1, help="number of last epochs whose mean test metrics are final; null: test of the best epoch"
    )
    validation_interval: int = setting(
        1, minimum=1, help="steps between two validation batches, for loss methods that learn from validation losses (coba)"
    )
    checkpoint_minutes: float = setting(10.0, above=0, help="time between two checkpoints within an epoch, in minutes")


@dataclass
class RunConfig:
    """One run. `config_schema` adds the groups ``loss``, ``gradient``, ``optimizer``, ``data``, ``model`` and ``agent``."""

    experiment: str = setting("digits", help="problem to train on")
    loss_method: str = setting("ls", help="loss balancer, or a chain of them: scaleinvls+rlw")
    gradient_method: str | None = setting(None, help="gradient balancer; null: an ordinary backward pass")
    chosen_by: str | None = setting(None, help="reason of methods that a diagnosis chose, with auto for both; set by the run")
    seed: int = setting(0, help="seed of the model, of the order of the data and of the balancer")
    protocol: ProtocolName = setting("sound", help="paper: settings and rules of the published code")
    resume: bool = setting(default=False, help="continue the newest unfinished run with this configuration, if there is one")
    output_dir: str = setting("runs", help="folder for runs and for MLflow's file")
    track: bool = setting(default=True, help="record the run in MLflow")
    loggers: list[str] = setting(
        [], choices=("tensorboard", "wandb"), help="loggers in addition to MLflow, in the run's folder"
    )
    log_every: int = setting(10, minimum=1, help="steps between two records")
    log_model: bool = setting(default=True, help="record the network and its checkpoints as artifacts")
    system_metrics: bool = setting(default=False, help="record the use of processor, memory, disk and network")
    device: str = setting("cpu", help="device of torch, such as cuda")
    balancer: StageConfig = field(default_factory=StageConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lbfgs: LBFGSConfig = field(default_factory=LBFGSConfig)


def last_epoch(train: DictConfig) -> int:
    """Return the number of the last epoch; a step of LBFGS counts as an epoch."""
    number: int = train.epochs + train.lbfgs_steps
    return number


def config_schema(problem: Problem, loss_method: str, gradient_method: str | None, optimizer: str) -> type[RunConfig]:
    """Return `RunConfig` with the options of the two methods, of the optimizer, and of the problem's data, network and agent.

    Args:
        problem: The problem.
        loss_method: A loss method, or a chain of them.
        gradient_method: A gradient method, or none.
        optimizer: Name of the optimizer. An unknown name, which the entry ``train.optimizer`` refuses, is allowed.

    Returns:
        A dataclass.

    Raises:
        ValueError: If a method is unknown.
    """
    loss, gradient = methods_schema(loss_method, gradient_method)
    groups = {"loss": loss, "gradient": gradient, "optimizer": OPTIMIZERS.get(optimizer, AdamConfig)}
    groups |= {"data": problem.DataConfig, "model": problem.ModelConfig}
    groups |= {} if problem.AgentConfig is None else {"agent": problem.AgentConfig}
    entries = [(name, group, field(default_factory=group)) for name, group in groups.items()]
    return make_dataclass("Config", entries, bases=(RunConfig,))
