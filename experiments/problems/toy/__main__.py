"""Draw where methods come to rest on the two-loss landscape: toy.png and toy.pdf.

python -m experiments.problems.toy --output figures --methods ls famo uw+mgda
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import joblib
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.problems.toy.descent import METHODS, STEPS, build_balancer, descend
from experiments.problems.toy.landscape import SCALE, STARTS, Array, values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MANY = 1000  # steps from which on starting worker processes pays


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 after a drawn figure, 2 for a mistake in the command, 130 after Ctrl-C."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    console = Console()
    begin = time.perf_counter()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        paths = trajectories(list(dict.fromkeys(options.methods)), options.steps, options.scale, options.jobs)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        console.print("Interrupted. Nothing was drawn.")
        return 130
    files = save(paths, options.scale, options.output)
    console.print(last_points(paths, options.scale))
    console.print(f"{time.perf_counter() - begin:.1f} s. Saved {', '.join(map(str, files))}", soft_wrap=True)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    sentence, _, example = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.problems.toy",
        description=sentence,
        epilog=f"example:\n  {example.strip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="folder for the figure")
    parser.add_argument(
        "--methods",
        metavar="NAME",
        nargs="+",
        default=METHODS,
        help="registered names, or several joined by +, a gradient balancer last (default: %(default)s)",
    )
    parser.add_argument("--steps", metavar="N", type=int, default=STEPS, help="steps of Adam (default: %(default)s)")
    parser.add_argument(
        "--scale", metavar="X", type=float, default=SCALE, help="scale of the first loss (default: %(default)s)"
    )
    parser.add_argument("--jobs", metavar="N", type=int, help="trajectories at a time (default: number of cores)")
    return parser


def trajectories(methods: Sequence[str], steps: int = STEPS, scale: float = SCALE, jobs: int | None = None) -> dict[str, Array]:
    """Compute the trajectories of methods from all starts, in parallel, under a progress bar.

    Args:
        methods: Names of pairings.
        steps: Steps of Adam.
        scale: Scale of the first loss.
        jobs: Processes; None: one for each core, or this process if there are few steps.

    Returns:
        By method, points before every step and after the last. Shape (steps + 1, S, 2).

    Raises:
        ValueError: If a method is unknown, or an option is out of range.
    """
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, but got {steps}.")
    if not scale > 0:
        raise ValueError(f"--scale must be positive, but got {scale}.")
    for method in methods:
        build_balancer(method)  # so that a mistake is reported before anything is computed
    pairs = [(method, start) for method in methods for start in STARTS]
    workers = joblib.Parallel(n_jobs=jobs or (-1 if steps >= MANY else 1), return_as="generator")
    computed = workers(joblib.delayed(trajectory)(method, start, steps, scale) for method, start in pairs)
    shown = track(computed, "trajectories", total=len(pairs), console=Console(stderr=True), transient=True)
    paths = dict(zip(pairs, shown, strict=True))
    return {method: np.stack([paths[method, start] for start in STARTS], axis=1) for method in methods}


def trajectory(method: str, start: tuple[float, float], steps: int, scale: float) -> Array:
    """Compute the trajectory of a method from a start. Shape (steps + 1, 2)."""
    return descend(build_balancer(method), start, steps, scale=scale)


def save(paths: Mapping[str, Array], scale: float, folder: Path) -> list[Path]:
    """Draw the trajectories and return the files."""
    from experiments.problems.toy.figure import draw  # noqa: PLC0415 - mistakes are reported before matplotlib is loaded

    figure = draw(paths, scale)
    files = [folder / "toy.png", folder / "toy.pdf"]
    for file in files:
        figure.savefig(file, dpi=200)
    return files


def last_points(paths: Mapping[str, Array], scale: float) -> Table:
    """Return a table of the last points and their losses, with a row for each method and start."""
    table = Table("method", "start", "a", "b", "L1", "L2", title="last points and their losses")
    for method, path in paths.items():
        for start, end in zip(STARTS, path[-1], strict=True):
            numbers = [f"{number:.3f}" for number in (*end, *values(end, scale))]
            table.add_row(method, f"({start[0]:g}, {start[1]:g})", *numbers)
    return table


if __name__ == "__main__":
    sys.exit(main())
