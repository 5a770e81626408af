"""Study which method is best: all methods with equal budgets for tuning, on all problems that come with the project.

python experiments/study.py --small --output_dir=runs/small_study
"""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from experiments.cli import (
    add_backend,
    add_output,
    backend_connected,
    check_backend,
    command_parser,
    requested_workers,
    run_command,
)
from experiments.studies.choice import MissingReferenceError
from experiments.studies.console import show_plan
from experiments.studies.execution import Execution, first_jobs
from experiments.studies.figures import write_figures
from experiments.studies.ranking import can_rank, rank_methods, require_posthocs
from experiments.studies.report import report
from experiments.studies.results import collect
from experiments.studies.study_file import SHIPPED, read_study, small_version, with_problems

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from experiments.cli import Work
    from experiments.studies.record import StudyRecord
    from experiments.studies.study_file import Study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if all runs finished, 1 if some failed, 2 for a mistake, 130 after Ctrl-C."""
    parser = build_parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = f"python experiments/study.py {shlex.join(words)}".rstrip()
    interrupted = "Interrupted. The same command resumes from here."
    return run_command(parser, words, partial(prepare_work, parser=parser, command=command), interrupted=interrupted)


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with flags for the study, its size, and the machine."""
    parser = command_parser(__doc__, with_experiment=False)
    add_output(parser)
    parser.add_argument("--file", type=Path, default=SHIPPED, metavar="FILE", help="YAML file (default: which_method.yaml)")
    parser.add_argument("--small", action="store_true", help="the small budget of the file")
    parser.add_argument("--problems", metavar="NAME,NAME,...", help="only these problems of the file")
    add_backend(parser)
    parser.add_argument("--dry_run", action="store_true", help="print the plan and its estimated time, and run nothing")
    return parser


def prepare_work(options: argparse.Namespace, *, parser: argparse.ArgumentParser, command: str) -> Work:
    """Read and check the study, and return the work: to run it and to report.

    Returns:
        A function that runs what has not finished, and writes the report.

    Raises:
        ValueError: If an option or the file is wrong.
        ImportError: If the library for the ranks is not installed.
    """
    require_posthocs()
    check_backend(options)
    study = read_options(options)
    further = (f"output_dir={Path(options.output_dir or 'runs').expanduser().resolve()}",)
    # All runs are configured here, so that a mistake in the file is found before the first one
    configs = [job.config for problem in study.problems.values() for job in first_jobs(study, problem, further)]
    workers = requested_workers(options, configs)
    return partial(run_and_report, study, further, workers, options, parser=parser, command=command)


def read_options(options: argparse.Namespace) -> Study:
    """Return the study that the options describe.

    Raises:
        ValueError: If the file or a name is wrong.
    """
    study = read_study(options.file)
    study = small_version(study) if options.small else study
    return study if options.problems is None else with_problems(study, options.problems.split(","))


def run_and_report(
    study: Study,
    further: tuple[str, ...],
    workers: int | None,
    options: argparse.Namespace,
    *,
    parser: argparse.ArgumentParser,
    command: str,
) -> int:
    """Run the study and write its report; return the exit code."""
    console = Console(soft_wrap=True)
    with backend_connected(options, workers, parser) as number:
        show_plan(study, further, number, console, timed=options.dry_run)
        if options.dry_run:
            return 0
        try:
            failed = Execution(study, further, number, options.backend, console).run()
        except MissingReferenceError as error:
            console.print(f"No report: {error}", markup=False)
            return 1
    folder = Path(further[0].partition("=")[2]) / "study"
    write_report(collect(study, further), folder, command, console)
    return 1 if failed else 0


def write_report(record: StudyRecord, folder: Path, command: str, console: Console) -> None:
    """Write record, figures and report into a folder, which is created; only the record where nothing can be ranked."""
    folder.mkdir(parents=True, exist_ok=True)
    record.write(folder / "record.json")
    if not can_rank(record):
        console.print(
            f"Record: {folder / 'record.json'}. Ranks and a report need two problems and three methods.", markup=False
        )
        return
    ranking = rank_methods(record)
    write_figures(record, ranking, folder)
    (folder / "report.md").write_text(report(record, ranking, command), encoding="utf-8")
    console.print(f"Report: {folder / 'report.md'}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
