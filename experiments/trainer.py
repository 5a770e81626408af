"""Train one network on the tasks of an experiment, with any loss balancer and any gradient balancer.

python experiments/trainer.py --loss_method=go4align --gradient_method=pcgrad --seed=0 train.epochs=5 loss.num_groups=3
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from omegaconf import OmegaConf
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from balance.config import build_balancer, measured
from balance.profiling import peak_memory
from balance.tracking import connect
from experiments.cli import add_methods, add_output, add_overrides, all_overrides, command_parser, run_command
from experiments.config.description import table
from experiments.config.layers import configure
from experiments.problems import base as experiments
from experiments.recording.run_log import log_data, log_model, tracker_of
from experiments.training.checkpoint import Selection
from experiments.training.console import logged, losses_line, metrics_line, progress_bar, show
from experiments.training.data import Waiting, begin_epoch, brought, training
from experiments.training.evaluation import evaluate, mean_of
from experiments.training.schedule import Schedule

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from omegaconf import DictConfig
    from torch import nn
    from torch.utils.data import DataLoader

    from balance import Balancer, Report
    from experiments.cli import Work
    from experiments.problems.base import Batch, Experiment, Network, Splits


class Run(NamedTuple):
    """Everything that a run needs, checked before anything is trained."""

    config: DictConfig
    experiment: Experiment
    data: Splits
    batches: DataLoader[Batch]  # of the training data
    model: Network
    balancer: Balancer
    folder: Path
    console: Console


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 after a finished run, 2 for a mistake in the command, 130 after Ctrl-C."""
    interrupted = "Interrupted. What was logged stays; the run is marked KILLED."
    return run_command(build_parser(), arguments, prepare_work, interrupted=interrupted)


def prepare_work(options: argparse.Namespace) -> Work:
    """Return the work of the command: to train, or only to print the configuration."""
    config = configure(all_overrides(options))
    if options.print_config:
        return partial(print_config, config)
    if options.list_settings:
        return partial(list_settings, config)
    return partial(train_once, prepare(config))


def print_config(config: DictConfig) -> int:
    """Print a configuration as YAML; return the exit code."""
    print(OmegaConf.to_yaml(config), end="")
    return 0


def list_settings(config: DictConfig) -> int:
    """Print all entries of a configuration with value, range and role; return the exit code."""
    Console(width=None if sys.stdout.isatty() else 160).print(table(config))
    return 0


def train_once(run: Run) -> int:
    """Train; return the exit code."""
    train(run)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Flags for what every run chooses; everything else is a key of the schema."""
    parser = command_parser(__doc__)
    add_output(parser)
    add_methods(parser, several=False)
    parser.add_argument(
        "--seed", metavar="N", help="seed of the model, of the order of the data and of the balancer (default: 0)"
    )
    parser.add_argument("--print_config", action="store_true", help="print the configuration as YAML, and train nothing")
    parser.add_argument(
        "--list_settings", action="store_true", help="print all entries with value, range and role, and train nothing"
    )
    add_overrides(parser, "any entry of the configuration, such as train.epochs=3 loss.num_groups=2")
    return parser


def parse(arguments: Sequence[str]) -> DictConfig:
    """Return the configuration that a command line describes.

    Raises:
        ValueError: If a name or a key is unknown, or a value has the wrong type or is out of range.
        ModuleNotFoundError: If the experiment needs a library that is not installed.
    """
    return configure(all_overrides(build_parser().parse_intermixed_args(list(arguments))))


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
    experiment = experiments.under(config.protocol, experiments.find(config.experiment))
    balancer = build_balancer(config, experiment.TASKS)
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={config.device} is not to be had: {str(error).splitlines()[0]}") from None
    torch.manual_seed(config.seed)
    data = experiment.load(config.data)
    batches = training(data.train, config)
    model = experiments.build_network(experiment, config).to(config.device)
    measured(dict(model.trunk.named_parameters()), config.balancer.measure)
    return Run(config, experiment, data, batches, model, balancer, Path(config.output_dir), console or Console())


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
    config, model = run.config, run.model
    optimizer = build_optimizer(run)
    schedule = Schedule(optimizer, config.train, len(run.batches))
    selection = Selection(run)
    steps = config.train.epochs * len(run.batches)
    step, costs = 0, Costs()
    tests = list[dict[str, float]]()  # of the epochs that train.report_last asks for
    (run.folder / "config.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    with tracker_of(run, parent) as tracker, progress_bar(run.console) as bar, experiments.by_design():
        tracker.log_text(OmegaConf.to_yaml(config), "config.yaml")
        log_data(tracker, run)
        shown = bar.add_task("", total=steps, losses="", epoch=1, epochs=config.train.epochs)
        for epoch in range(1, config.train.epochs + 1):
            model.train()
            begin_epoch(run.data.train, epoch)
            waiting = Waiting(run.batches)
            for cpu_batch in waiting:
                batch = brought(cpu_batch, config.device)
                # Memory is measured once, not in the first step, which makes the optimizer's state
                report = costs.step(run, optimizer, batch, measured=step == min(1, steps - 1))
                schedule.after_step()
                if step % config.log_every == 0:
                    tracker.log_metrics(logged(report), step)
                    bar.update(shown, losses=losses_line(report))
                step += 1
                bar.update(shown, advance=1, epoch=epoch)
            run.balancer.end_epoch()
            waited = {"cost/waiting": waiting.share()}
            metrics = evaluate(run, run.data.validation)
            tracker.log_metrics(waited | {f"val/{name}": value for name, value in metrics.items()}, step)
            if epoch > config.train.epochs - (config.train.report_last or 0):
                tests.append(metrics if run.data.test is run.data.validation else evaluate(run, run.data.test))
            schedule.after_epoch(selection.offer(epoch, metrics, checkpoint(run, epoch)))
            torch.save(checkpoint(run, epoch, optimizer), run.folder / "last.pt")
            bar.console.print(f"epoch {epoch:3d}  {metrics_line(metrics)}", soft_wrap=True)
        model.load_state_dict(selection.state["model"])
        final = mean_of(tests or [evaluate(run, run.data.test)])
        if (drop := selection.drop(final)) is not None:
            final["delta_m"] = drop
        seconds = time.perf_counter() - costs.begin
        summary = {f"final/{name}": value for name, value in final.items()} | costs.summary(seconds)
        tracker.log_metrics(summary | {"best_epoch": selection.epoch}, step)
        (run.folder / "final.json").write_text(json.dumps(final, indent=2) + "\n", encoding="utf-8")
        if config.log_model:
            log_model(tracker, run)
    show(run, selection, final)
    run.console.print(f"{seconds:.1f} s, of which {tracker.seconds:.2f} s for tracking. Saved in {run.folder}", soft_wrap=True)
    return final


class Costs:
    """Makes the steps of a run, and tells what they cost."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.durations: list[float] = []  # of steps, in seconds
        self.peak = 0  # bytes that a step needs at its height

    def step(self, run: Run, optimizer: torch.optim.Optimizer, batch: Batch, *, measured: bool) -> Report:
        """`train_step`, timed, or with a look at its memory."""
        if measured:
            optimizer.zero_grad()  # the step is not to be credited with freeing them
            reports: list[Report] = []
            self.peak = peak_memory(lambda: reports.append(train_step(run, optimizer, batch)), run.config.device)
            return reports[0]
        begin = time.perf_counter()
        report = train_step(run, optimizer, batch)
        self.durations.append(time.perf_counter() - begin)
        return report

    def summary(self, seconds: float) -> dict[str, float]:
        """A step in milliseconds and MiB, the whole in seconds."""
        of_a_step = {"cost/step_ms": 1000 * statistics.median(self.durations)} if self.durations else {}
        return of_a_step | {"cost/step_mib": self.peak / 2**20, "cost/run_s": seconds}


def train_step(run: Run, optimizer: torch.optim.Optimizer, batch: Batch) -> Report:
    """One step of the optimizer."""
    optimizer.zero_grad()
    features = run.model.trunk(batch[0])
    losses = run.experiment.losses(run.model.heads(features), batch)
    shared = dict(run.model.trunk.named_parameters())
    measure = measured(shared, run.config.balancer.measure)
    report = run.balancer.backward(losses, shared=shared.values(), features=features, measure=measure)
    if run.config.train.max_norm is not None:
        clipped = run.model.trunk if run.config.protocol == "paper" else run.model
        torch.nn.utils.clip_grad_norm_(clipped.parameters(), run.config.train.max_norm)
    optimizer.step()
    if run.balancer.needs_observation:
        with torch.no_grad(), buffers_kept(run.model, keep=run.config.protocol == "sound"):
            run.balancer.observe(run.experiment.losses(run.model(batch[0]), batch))
    return report


@contextmanager
def buffers_kept(model: nn.Module, *, keep: bool) -> Iterator[None]:
    """Leave statistics of batch normalisation as they were; in the published codes a second forward pass changes them too."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()] if keep else []
    yield
    for buffer, content in before:
        buffer.copy_(content)


def build_optimizer(run: Run) -> torch.optim.Adam:
    """Adam for the model and, at its own rate, for the parameters of the balancer."""
    return torch.optim.Adam(
        [
            {"params": list(run.model.parameters()), "lr": run.config.train.lr, "weight_decay": run.config.train.weight_decay},
            {"params": list(run.balancer.parameters()), "lr": run.config.train.balancer_lr},
        ]
    )


def checkpoint(run: Run, epoch: int, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """States after an epoch."""
    state = {"model": run.model.state_dict(), "balancer": run.balancer.state_dict(), "epoch": epoch}
    return state if optimizer is None else state | {"optimizer": optimizer.state_dict()}


if __name__ == "__main__":
    sys.exit(main())
