"""Everything that a training run needs, checked before it starts."""

from __future__ import annotations

import inspect
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from balance.config import build_balancer, measured
from balance.tracking import connect
from experiments.problems import base as problems
from experiments.recording.loggers import further_loggers
from experiments.training import ranks
from experiments.training.checkpoint_files import write_file
from experiments.training.data import training_batches
from experiments.training.lbfgs_checks import check_lbfgs
from experiments.training.resumption import CONFIG, find_unfinished, lock_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from filelock import BaseFileLock
    from omegaconf import DictConfig
    from torch.utils.data import DataLoader

    from balance import Balancer
    from experiments.problems.base import Agent, Batch, ByTask, Network, Problem, Splits


# The option not to send buffers before each forward pass; torch 2.13 has given it another name
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_WITHOUT_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers": False
}


class Run(NamedTuple):
    """Configuration, data, network and balancer of a training run, and the places for its output."""

    config: DictConfig
    problem: Problem
    data: Splits
    batches: DataLoader[Batch] | Agent  # of the training data
    model: Network
    balancer: Balancer
    folder: Path  # for its files; `build` leaves the folder of all runs here
    console: Console
    scaler: GradScaler  # of the losses, disabled without train.precision=fp16
    forward: nn.Module  # from inputs to features and outputs; of several ranks, a wrapper that reduces gradients
    agent: Agent | None = None  # which collects the batches, for problems that have one
    lock: BaseFileLock | None = None  # of the folder, until the run ends
    run_id: str | None = None  # of the MLflow run that is resumed; None for a new one


def prepare(config: DictConfig, console: Console | None = None) -> Run:
    """Build a run and create its folder, or find the folder of the unfinished run that it continues, with ``resume``.

    Whatever can be wrong with a configuration is found here, before training.

    Args:
        config: As `experiments.config.layers.configure` returns it.
        console: Console to print to; None for the terminal.

    Returns:
        The run, ready to train.

    Raises:
        ValueError: If an option is out of range, or the device is not available.
        OSError: If the output folder cannot be written, or the tracking store cannot be used.
    """
    run = build(config, console)
    placed = place(run) if ranks.is_first() else run
    return placed._replace(folder=ranks.from_first(placed.folder))


def place(run: Run) -> Run:
    """Return a run with the locked folder of the unfinished run that it continues, or with a new one.

    Raises:
        OSError: If the output folder cannot be written, or the tracking store cannot be used.
    """
    config = run.config
    unfinished = find_unfinished(config) if config.resume else None
    if unfinished is not None:
        run.console.print(f"Resuming the run in {unfinished.folder}", soft_wrap=True)
        return run._replace(folder=unfinished.folder, lock=unfinished.lock, run_id=unfinished.run_id)
    if config.resume:
        run.console.print("No unfinished run has this configuration. A new run starts.", soft_wrap=True)
    folder = create_folder(config)
    lock = lock_of(folder)
    lock.acquire()
    write_file(folder / CONFIG, lambda file: file.write(OmegaConf.to_yaml(config).encode()))
    return run._replace(folder=folder, lock=lock)


def build(config: DictConfig, console: Console | None = None) -> Run:
    """Build a run without writing anything.

    Args:
        config: As `experiments.config.layers.configure` returns it.
        console: Console to print to; None for the terminal.

    Returns:
        The run, without a folder.

    Raises:
        ValueError: If an option is out of range, or the device is not available.
    """
    problem = problems.with_tasks(problems.under(config.protocol, problems.find(config.experiment)), config.data)
    balancer = build_balancer(config, problem.TASKS)
    check_device(config.device)
    further_loggers(config, Path(config.output_dir))  # refuses loggers that are not installed
    torch.manual_seed(config.seed)
    data = problem.load(config.data)
    model = problem.build_model(config.model).to(config.device)
    check_agent(config, problem, balancer)
    agent = problem.build_agent(data, model, config) if problem.build_agent else None
    batches = agent or training_batches(data.train, config)
    measured(dict(model.trunk.named_parameters()), config.balancer.measure)  # refuses patterns that fit no parameter
    check_lbfgs(config, model, problem, data.train)
    check_micro_batches(config, problem, balancer)
    scaler = GradScaler(torch.device(config.device).type, enabled=config.train.precision == "fp16")
    console = (console or Console()) if ranks.is_first() else Console(quiet=True)
    forward: nn.Module = Forward(model)
    if ranks.size() > 1:
        torch.manual_seed(config.seed + ranks.rank())  # ranks drop different units
        forward = DistributedDataParallel(forward, **_WITHOUT_BUFFERS)  # a rank may have no batch, and no forward pass
    return Run(config, problem, data, batches, model, balancer, Path(config.output_dir), console, scaler, forward, agent)


class Forward(nn.Module):
    """The forward pass of a network, which returns features and outputs."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> tuple[Any, ByTask]:
        """Return features, and outputs by task."""
        features = self.model.trunk(inputs)
        return features, self.model.heads(features)


@contextmanager
def closed(agent: Agent | None) -> Iterator[None]:
    """Free what an agent holds, if there is one, on exit."""
    try:
        yield
    finally:
        if agent is not None:
            agent.close()


def check_micro_batches(config: DictConfig, problem: Problem, balancer: Balancer) -> None:
    """Check that the choices of the stage fit micro-batches that are computed one after the other.

    Raises:
        ValueError: If one of them needs all of a batch in one graph.
    """
    if problem.micro_batches is None or not config.train.micro_batches:
        return
    rule = balancer.gradient_balancer
    needs_one_graph = {
        f"balancer.measure={config.balancer.measure}": config.balancer.measure is not None,
        f"balancer.source=features with {config.gradient_method}": balancer.source == "features"
        and rule is not None
        and rule.sees == "jacobian",
    }
    if chosen := [choice for choice, is_chosen in needs_one_graph.items() if is_chosen]:
        raise ValueError(
            f"train.micro_batches must be false with {chosen[0]}, which needs the whole batch in one graph, but got true. Set "
            "train.micro_batches=false."
        )


def check_agent(config: DictConfig, problem: Problem, balancer: Balancer) -> None:
    """Check that the choices of a run fit an agent that collects its batches, if the problem has one.

    Raises:
        ValueError: If one of them needs data that are read.
    """
    if problem.build_agent is None:
        return
    chosen = {
        "loss_method=stl; a run of one task needs data.tasks=NAME": config.loss_method == "stl",
        "balancer.source=features, where the tasks have different rows": balancer.source == "features",
        f"train.lbfgs_steps={config.train.lbfgs_steps}": bool(config.train.lbfgs_steps),
        f"train.num_workers={config.train.num_workers}": bool(config.train.num_workers),
        f"loss_method={config.loss_method}, which learns from validation losses": balancer.needs_validation,
        f"torchrun with {ranks.size()} processes": ranks.size() > 1,
    }
    if refused := [choice for choice, is_chosen in chosen.items() if is_chosen]:
        raise ValueError(
            f"The agent of '{config.experiment}' collects its own batches in one process, but got {refused[0]}. Leave it out."
        )


def check_device(device: str) -> None:
    """Check that tensors can be created on a device.

    Raises:
        ValueError: If they cannot.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"Device '{device}' is not available: {str(error).splitlines()[0]}") from None


def create_folder(config: DictConfig) -> Path:
    """Create a folder for one run, and the tracking store if it does not exist.

    Returns:
        The path of the folder.

    Raises:
        OSError: If the folder cannot be written, or the tracking store cannot be used.
    """
    parent = Path(config.output_dir).expanduser().resolve() / config.experiment
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=folder_prefix(config), dir=parent))
    except OSError as error:
        raise OSError(f"output_dir: cannot write to {parent} ({error.strerror}). Set output_dir to another folder.") from None
    try:
        if config.track:
            connect(f"balance/{config.experiment}", config.output_dir)
    except OSError:
        folder.rmdir()
        raise
    return folder


def folder_prefix(config: DictConfig) -> str:
    """Return the name of a run's folder, from time, methods and seed, without the random end that makes it unique."""
    methods = [*filter(None, (config.loss_method.replace("+", "-"), config.gradient_method))]
    if config.loss_method == "stl":
        methods.insert(1, problems.tasks_of(config)[config.loss.main_task])
    return "-".join((time.strftime("%Y%m%d-%H%M%S"), *methods, f"seed{config.seed}", ""))
