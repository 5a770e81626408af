"""Train one network on the tasks of an experiment, with any loss balancer and any gradient balancer.

python experiments/trainer.py --loss_method=go4align --gradient_method=pcgrad --seed=0 train.epochs=5 loss.num_groups=3
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import yaml
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from balance.config import StageConfig, build_balancer, compose, flatten, measured, method_names, methods_schema
from balance.cost import peak_memory
from balance.metrics import delta_m
from balance.tracking import connect
from experiments import experiment as experiments
from experiments.arguments import add_methods, add_output, add_overrides, choices, command_line, overrides_of
from experiments.recording import log_data, log_model, tracker_of
from experiments.results import reference
from experiments.results.store import common_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from omegaconf import DictConfig
    from torch.utils.data import Dataset

    from balance import Balancer, Report
    from experiments.experiment import Batch, Experiment, Network, Splits


@dataclass
class TrainConfig:
    """Optimization: Adam, with a learning rate of its own for parameters that the balancer owns.

    Both rates stay as they are, or fall to zero along half a cosine.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-3
    balancer_lr: float = 0.025
    schedule: Literal["constant", "cosine"] = "constant"
    max_norm: float | None = None  # clip the gradient of the model to this length, after the stage


@dataclass
class RunConfig:
    """One run. ``loss``, ``gradient`` and ``data`` get the options of the methods and of the experiment."""

    experiment: str = "digits"
    loss_method: str = "ls"
    gradient_method: str | None = None
    seed: int = 0
    output_dir: str = "runs"
    track: bool = True
    log_every: int = 10
    log_model: bool = True  # the network and its checkpoints, as artifacts
    system_metrics: bool = False  # use of processor, memory, disk and network
    device: str = "cpu"
    balancer: StageConfig = field(default_factory=StageConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


class Run(NamedTuple):
    """Everything that a run needs, checked before anything is trained."""

    config: DictConfig
    experiment: Experiment
    data: Splits
    model: Network
    balancer: Balancer
    folder: Path
    console: Console


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 after a finished run, 2 for a mistake in the command, 130 after Ctrl-C."""
    parser = build_parser()
    options = parser.parse_intermixed_args(arguments)
    try:
        run = prepare(configure(options))
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    try:
        train(run)
    except KeyboardInterrupt:
        run.console.print("Interrupted. What was logged stays; the run is marked KILLED.")
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Flags for what every run chooses; everything else is a key of the schema."""
    parser = command_line(__doc__)
    add_output(parser)
    add_methods(parser, several=False)
    parser.add_argument(
        "--seed", metavar="N", help="seed of the model, of the order of the data and of the balancer (default: 0)"
    )
    add_overrides(parser, "any entry of the configuration, such as train.epochs=3 loss.num_groups=2")
    return parser


def configure(options: argparse.Namespace) -> DictConfig:
    """Defaults, then the experiment's file, then the command line.

    Raises:
        ValueError: If a name or a key is unknown, or a value has the wrong type or is out of range.
    """
    overrides = overrides_of(options)
    choice = choices(overrides)
    name = choice.get("experiment", RunConfig.experiment)
    file = experiments.FOLDER / "configs" / f"{name}.yaml"
    data_config = experiments.find(name).DataConfig
    of_experiment = yaml.safe_load(file.read_text(encoding="utf-8"))
    of_methods = of_experiment.pop("methods", {})  # options that suit the experiment, by method
    loss_method = choice.get("loss_method", RunConfig.loss_method)
    gradient_method = choice.get("gradient_method")
    if gradient_method in ("none", "None", "null", ""):
        overrides.append("gradient_method=null")
        gradient_method = None
    names = method_names(loss_method)
    of_loss = of_methods.get(loss_method, {}) if len(names) == 1 else {name: of_methods.get(name, {}) for name in names}
    of_experiment |= {"loss": of_loss, "gradient": of_methods.get(gradient_method, {})}
    loss, gradient = methods_schema(loss_method, gradient_method)
    parts = [
        (key, part, field(default_factory=part))
        for key, part in (("loss", loss), ("gradient", gradient), ("data", data_config))
    ]
    config = compose(make_dataclass("Config", parts, bases=(RunConfig,)), of_experiment, overrides)
    for key, value in flatten(config).items():
        if key in ("train.epochs", "train.batch_size", "log_every") and value < 1:
            raise ValueError(f"{key} must be at least 1, but got {value}.")
        if key in ("train.lr", "train.balancer_lr", "train.max_norm") and value is not None and not value > 0:
            raise ValueError(f"{key} must be positive, but got {value}.")
    return config


def prepare(config: DictConfig, console: Console | None = None) -> Run:
    """Build everything, so that a mistake costs nothing.

    Args:
        config: As `configure` makes it.
        console: Where to print; None for the terminal.

    Raises:
        ValueError: If an option is out of range, or the device is not there.
        OSError: If the output folder cannot be written, or the tracking store cannot be used.
    """
    run = build(config, console)
    return run._replace(folder=new_folder(config))


def build(config: DictConfig, console: Console | None = None) -> Run:
    """What `prepare` makes, but for the folder: nothing is written.

    Raises:
        ValueError: If an option is out of range, or the device is not there.
    """
    experiment = experiments.find(config.experiment)
    balancer = build_balancer(config, experiment.TASKS)
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={config.device} is not to be had: {str(error).splitlines()[0]}") from None
    torch.manual_seed(config.seed)
    data = experiment.load(config.data)
    model = experiment.build_model().to(config.device)
    measured(dict(model.trunk.named_parameters()), config.balancer.measure)
    return Run(config, experiment, data, model, balancer, Path(config.output_dir), console or Console())


def new_folder(config: DictConfig) -> Path:
    """A folder for this run alone, named after time, methods and seed; the tracking store is tried first.

    Raises:
        OSError: If nothing can be written there, or the tracking store cannot be used.
    """
    parent = Path(config.output_dir).expanduser().resolve() / config.experiment
    methods = [*filter(None, (config.loss_method.replace("+", "-"), config.gradient_method))]
    if config.loss_method == "stl":
        methods.insert(1, experiments.find(config.experiment).TASKS[config.loss.main_task])
    name = "-".join((time.strftime("%Y%m%d-%H%M%S"), *methods, f"seed{config.seed}", ""))
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=name, dir=parent))
    except OSError as error:
        raise OSError(f"output_dir: cannot write to {parent} ({error.strerror}). Choose another with output_dir=...") from None
    try:
        if config.track:
            connect(f"balance/{config.experiment}", config.output_dir)
    except OSError:
        folder.rmdir()
        raise
    return folder


def train(run: Run, parent: str | None = None) -> dict[str, float]:
    """Train, select the epoch on validation, test it once.

    Args:
        run: As `prepare` makes it.
        parent: Id of the MLflow run under which this one is shown.

    Returns:
        Test metrics by name, and ``delta_m``.
    """
    config, model, balancer = run.config, run.model, run.balancer
    optimizer = build_optimizer(run)
    order = torch.Generator().manual_seed(config.seed)
    batches = loader(run.data.train, RandomSampler(run.data.train, generator=order), config.train.batch_size)  # type: ignore[arg-type]
    steps = config.train.epochs * len(batches)
    decay = {"constant": lambda _: 1.0, "cosine": lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)}[
        config.train.schedule
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    selection = Selection(run)
    step, start, durations, peak = 0, time.perf_counter(), list[float](), 0
    (run.folder / "config.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    with tracker_of(run, parent) as tracker, progress_bar(run.console) as bar:
        tracker.log_text(OmegaConf.to_yaml(config), "config.yaml")
        log_data(tracker, run)
        shown = bar.add_task("", total=steps, losses="", epoch=1, epochs=config.train.epochs)
        for epoch in range(1, config.train.epochs + 1):
            model.train()
            for cpu_batch in batches:
                batch = tuple(tensor.to(config.device) for tensor in cpu_batch)
                if step == min(1, steps - 1):  # not the first, which makes the optimizer's state
                    optimizer.zero_grad()  # the step is not to be credited with freeing them
                    peak, report = measured_step(run, optimizer, batch)
                else:
                    begin = time.perf_counter()
                    report = train_step(run, optimizer, batch)
                    durations.append(time.perf_counter() - begin)
                schedule.step()
                if step % config.log_every == 0:
                    tracker.log_metrics(report.as_metrics(), step)
                    bar.update(
                        shown,
                        losses=" ".join(f"{t} {v:.3g}" for t, v in zip(report.tasks, report.losses.tolist(), strict=True)),
                    )
                step += 1
                bar.update(shown, advance=1, epoch=epoch)
            balancer.end_epoch()
            metrics = evaluate(run, run.data.validation)
            tracker.log_metrics({f"val/{name}": value for name, value in metrics.items()}, step)
            selection.offer(epoch, metrics)
            torch.save(checkpoint(run, epoch, optimizer), run.folder / "last.pt")
            line = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            bar.console.print(f"epoch {epoch:3d}  {line}", soft_wrap=True)
        model.load_state_dict(selection.state["model"])
        final = evaluate(run, run.data.test)
        final["delta_m"] = selection.drop(final)
        seconds = time.perf_counter() - start
        summary = {f"final/{name}": value for name, value in final.items()} | {"best_epoch": selection.epoch}
        tracker.log_metrics(summary | costs(durations, peak, seconds), step)
        (run.folder / "final.json").write_text(json.dumps(final, indent=2) + "\n", encoding="utf-8")
        if config.log_model:
            log_model(tracker, run)
    show(run, selection, final)
    run.console.print(f"{seconds:.1f} s, of which {tracker.seconds:.2f} s for tracking. Saved in {run.folder}", soft_wrap=True)
    return final


def costs(durations: Sequence[float], peak: int, seconds: float) -> dict[str, float]:
    """What a run cost: a step in milliseconds and MiB, the whole in seconds."""
    of_a_step = {"cost/step_ms": 1000 * statistics.median(durations)} if durations else {}
    return of_a_step | {"cost/step_mib": peak / 2**20, "cost/run_s": seconds}


def train_step(run: Run, optimizer: torch.optim.Optimizer, batch: Batch) -> Report:
    """One step of the optimizer."""
    optimizer.zero_grad()
    features = run.model.trunk(batch[0])
    losses = run.experiment.losses(run.model.heads(features), batch)
    shared = dict(run.model.trunk.named_parameters())
    measure = measured(shared, run.config.balancer.measure)
    report = run.balancer.backward(losses, shared=shared.values(), features=features, measure=measure)
    if run.config.train.max_norm is not None:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.train.max_norm)
    optimizer.step()
    if run.balancer.needs_observation:
        with torch.no_grad():
            run.balancer.observe(run.experiment.losses(run.model(batch[0]), batch))
    return report


def measured_step(run: Run, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[int, Report]:
    """`train_step`, and the bytes that it needs at its height."""
    reports: list[Report] = []
    peak = peak_memory(lambda: reports.append(train_step(run, optimizer, batch)), run.config.device)
    return peak, reports[0]


def build_optimizer(run: Run) -> torch.optim.Adam:
    """Adam for the model and, at its own rate, for the parameters of the balancer."""
    return torch.optim.Adam(
        [
            {"params": list(run.model.parameters()), "lr": run.config.train.lr},
            {"params": list(run.balancer.parameters()), "lr": run.config.train.balancer_lr},
        ]
    )


def checkpoint(run: Run, epoch: int, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """States after an epoch."""
    state = {"model": run.model.state_dict(), "balancer": run.balancer.state_dict(), "epoch": epoch}
    return state if optimizer is None else state | {"optimizer": optimizer.state_dict()}


class Selection:
    """Keeps the epoch with the best validation metrics, in memory and in ``best.pt`` of the run's folder.

    The best is the least delta_m of the tasks that are trained.

    The reference is the single-task baselines; where an experiment has none yet, the metrics of the first epoch.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.trained = set(run.experiment.TASKS)
        if run.config.loss_method == "stl":
            self.trained = {run.experiment.TASKS[run.config.loss.main_task]}
        known = reference.shipped(run.config.experiment)
        same = known is None or known[1] == dict(common_of(run.config))
        self.against = "single-task baselines" + ("" if same else ", which were measured with other settings")
        self.baselines: Mapping[str, float] = {} if known is None else known[0].metrics
        self.reference = self.baselines
        self.epoch = 0
        self.best = float("inf")
        self.state: dict[str, Any] = {}

    def offer(self, epoch: int, metrics: dict[str, float]) -> None:
        """Keep the model if this epoch is the best so far; the first is kept whatever it is."""
        self.reference = self.reference or metrics
        drop = self.drop(metrics)
        if drop < self.best or not self.state:
            self.epoch, self.best = epoch, drop
            self.state = copy.deepcopy(checkpoint(self.run, epoch))
            torch.save(self.state, self.run.folder / "best.pt")

    def drop(self, metrics: Mapping[str, float]) -> float:
        """delta_m of the tasks that are trained, against the reference."""
        of_trained = {name: value for name, value in metrics.items() if name.partition("/")[0] in self.trained}
        return delta_m(of_trained, self.reference, self.run.experiment.HIGHER_IS_BETTER)


def evaluate(run: Run, data: Dataset[Batch]) -> dict[str, float]:
    """Metrics over all samples of a data set."""
    metrics = run.experiment.metrics()
    for metric in metrics.values():
        metric.to(run.config.device)
    run.model.eval()
    with torch.no_grad():
        for cpu_batch in loader(data, SequentialSampler(data), 1000):  # type: ignore[arg-type]
            batch = tuple(tensor.to(run.config.device) for tensor in cpu_batch)
            outputs, targets = run.model(batch[0]), run.experiment.targets(batch)
            for name, metric in metrics.items():
                task = name.partition("/")[0]
                metric.update(outputs[task], targets[task])
    return {name: metric.compute().item() for name, metric in metrics.items()}


def loader(data: Dataset[Batch], order: Any, batch_size: int) -> DataLoader[Batch]:
    """Batches that are indexed at once, not collated sample by sample."""
    return DataLoader(data, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)


def progress_bar(console: Console) -> Progress:
    """A bar with the losses of the last logged step."""
    return Progress(
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
        console=console,
        transient=True,
    )


def show(run: Run, selection: Selection, final: dict[str, float]) -> None:
    """The table of test metrics beside the single-task baselines."""
    title = " + ".join(filter(None, (run.config.loss_method, run.config.gradient_method)))
    table = Table("task", "metric", "test", "single-task", title=f"{run.config.experiment}: {title}, epoch {selection.epoch}")
    for name, value in final.items():
        task, _, metric = name.partition("/")
        if metric:
            baseline = selection.baselines.get(name)
            better = "↑" if name in run.experiment.HIGHER_IS_BETTER else "↓"
            untrained = "" if task in selection.trained else " (not trained)"
            table.add_row(task, f"{metric} {better}", f"{value:.4f}{untrained}", "-" if baseline is None else f"{baseline:.4f}")
    run.console.print(table)
    against = selection.against if selection.baselines else "the first epoch, since there are no single-task baselines yet"
    run.console.print(f"delta_m {final['delta_m']:+.2f} % against {against} (lower is better)", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
