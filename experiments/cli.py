"""Flags, ``key=value`` overrides, exit codes and error messages that all commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from balance import gradient_balancers, loss_balancers
from experiments.problems import base as problems
from experiments.sweeps.backends import connected
from experiments.training.interruption import Interrupted
from experiments.training.threads import cores, runs_at_a_time

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from omegaconf import DictConfig

FLAGS = ("experiment", "loss_method", "gradient_method", "seed", "output_dir")
BACKENDS = ("loky", "ray", "dask")
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
MISTAKES = (ValueError, TypeError, OSError, ImportError)

Work = Callable[[], int]  # the work of a command whose options are valid; returns the exit code


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    prepare: Callable[[argparse.Namespace], Work],
    *,
    interrupted: str = "Interrupted.",
) -> int:
    """Parse a command line, check it, do its work.

    Args:
        parser: Parser of the command.
        arguments: Words of the command line; None for the words in ``sys.argv``.
        prepare: Checks the options and returns the work. Its exceptions of the kinds `MISTAKES` are printed with the usage, and
            the command exits with code 2. Exceptions of the work are errors of the program and keep their traceback.
        interrupted: Message after Ctrl-C during the work.

    Returns:
        The exit code of the work, or 130 after Ctrl-C, or 143 after SIGTERM.
    """
    options = parser.parse_intermixed_args(arguments)
    message = "Interrupted."
    try:
        with mistakes_refused(parser):
            work = prepare(options)
        message = interrupted
        return work()
    except KeyboardInterrupt as error:
        print(message)
        return error.exit_code if isinstance(error, Interrupted) else INTERRUPTED


@contextmanager
def mistakes_refused(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Exit with code 2, the usage and the message of the exception, if an exception of the kinds `MISTAKES` is raised."""
    try:
        yield
    except MISTAKES as error:
        parser.error(str(error))


def command_parser(description: str | None, *, with_experiment: bool = True) -> argparse.ArgumentParser:
    """Return a parser, by default with the flag ``--experiment``.

    Args:
        description: Docstring of the command's module: a sentence for the help, an empty line, an example.
        with_experiment: Whether the command has one experiment.
    """
    sentence, _, example = (description or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=" ".join(sentence.split()),
        epilog=f"example:\n  {example.strip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if with_experiment:
        parser.add_argument(
            "--experiment", metavar="NAME", help=f"name of the problem: {', '.join(problems.names())} (default: digits)"
        )
    return parser


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the folder of the runs."""
    parser.add_argument("--output_dir", metavar="FOLDER", help="folder for runs and for MLflow's file (default: runs)")


def add_methods(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Add flags for the two methods: one name each, or lists with commas."""
    many = "NAME,NAME,..." if several else "NAME"
    chain = "; a chain is written with plus signs: scaleinvls+rlw"
    auto = "" if several else "; auto for both flags: a diagnosis chooses"
    parser.add_argument("--loss_method", metavar=many, help=f"{', '.join(loss_balancers.names())} (default: ls){chain}{auto}")
    parser.add_argument(
        "--gradient_method", metavar=many, help=f"none, {', '.join(gradient_balancers.names())} (default: none){auto}"
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add flags for the number of runs at a time, and for the machines on which they run."""
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: cores divided by train.threads, or all of a cluster)"
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, default="loky", help="backend of joblib: processes here (loky), or a cluster"
    )
    parser.add_argument(
        "--cluster", metavar="ADDRESS", help="address of a running ray or dask cluster (default: from its environment)"
    )


def check_backend(options: argparse.Namespace) -> None:
    """Check the flags of `add_backend`.

    Raises:
        ValueError: If they contradict each other.
    """
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, but got {options.jobs}.")
    if options.cluster and options.backend == "loky":
        raise ValueError("--cluster needs --backend=ray or --backend=dask.")


def requested_workers(options: argparse.Namespace, configs: Sequence[DictConfig]) -> int | None:
    """Return the number of runs at a time that the flags of `add_backend` request; None for as many as a cluster takes.

    Args:
        options: Parsed flags.
        configs: Configurations of the runs.

    Raises:
        ValueError: If the machine has too few cores.
    """
    return runs_at_a_time(configs, options.jobs) if options.backend == "loky" else options.jobs


@contextmanager
def backend_connected(options: argparse.Namespace, workers: int | None, parser: argparse.ArgumentParser) -> Iterator[int]:
    """Let joblib run on the backend that the flags name, except in a dry run; yield the number of runs at a time.

    Args:
        options: Parsed flags, with ``dry_run``.
        workers: Requested number; None for as many as the cluster takes.
        parser: Parser of the command, which reports a cluster that does not answer.

    Yields:
        The number of runs at a time.
    """
    with ExitStack() as stack:
        if options.backend != "loky" and not options.dry_run:
            with mistakes_refused(parser):
                slots = stack.enter_context(connected(options.backend, options.cluster))
            workers = workers or slots
        yield workers or cores()  # of a dry run for a cluster, which is not asked


def add_overrides(parser: argparse.ArgumentParser, use: str) -> None:
    """Add the words ``key=value``, which may appear anywhere in the command line."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=use)


def all_overrides(options: argparse.Namespace) -> list[str]:
    """Return the flags of a command line as overrides, followed by its overrides."""
    flags = {flag: getattr(options, flag, None) for flag in FLAGS}
    return [f"{flag}={value}" for flag, value in flags.items() if value is not None] + list(options.overrides)


def parse_seeds(words: str) -> list[int]:
    """Return the seeds 0, 1, 2 for ``3``, and the seeds 4 and 7 for ``4,7``.

    Raises:
        ValueError: If the words are neither a number nor a list of different numbers.
    """
    try:
        numbers = [int(word) for word in words.split(",") if word]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or (len(numbers) == 1 and "," not in words and numbers[0] < 1):
        raise ValueError(f"--seeds must be how many, such as 3, or which, such as 4,7, but got '{words}'.")
    seeds = numbers if "," in words else list(range(numbers[0]))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds must differ from each other, but got '{words}'.")
    return seeds
