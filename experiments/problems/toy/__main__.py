"""Draw where methods come to rest on the two-loss landscape: toy.png and toy.pdf.

python -m experiments.problems.toy --output figures --methods ls famo uw+mgda
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.problems.toy.closed_forms import CLOSED_FORMS
from experiments.problems.toy.descent import METHODS, STEPS, trajectories
from experiments.problems.toy.landscape import SCALE, STARTS, Array, values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 after a drawn figure, 2 for a mistake in the command, 130 after Ctrl-C."""
    sentence, _, example = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.problems.toy",
        description=sentence,
        epilog=f"example:\n  {example.strip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="where the figure is written")
    parser.add_argument(
        "--methods",
        metavar="NAME",
        nargs="+",
        default=METHODS,
        help="registered names, or several joined by +, a gradient balancer last (default: %(default)s); slow, minutes "
        f"for each start, but for {', '.join(CLOSED_FORMS)}",
    )
    parser.add_argument("--steps", metavar="N", type=int, default=STEPS, help="of Adam (default: %(default)s)")
    parser.add_argument("--scale", metavar="X", type=float, default=SCALE, help="of the first loss (default: %(default)s)")
    options = parser.parse_args(arguments)
    console = Console()
    begin = time.perf_counter()
    try:
        if options.steps < 1:
            raise ValueError(f"--steps must be at least 1, but got {options.steps}.")
        if not options.scale > 0:
            raise ValueError(f"--scale must be positive, but got {options.scale}.")
        options.output.mkdir(parents=True, exist_ok=True)
        found = compute(list(dict.fromkeys(options.methods)), options.steps, options.scale, console)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        console.print("Interrupted. Nothing was drawn.")
        return 130
    files = save(found, options.scale, options.output)
    console.print(ends(found, options.scale))
    console.print(f"{time.perf_counter() - begin:.1f} s. Saved {', '.join(map(str, files))}", soft_wrap=True)
    return 0


def compute(methods: Sequence[str], steps: int, scale: float, console: Console) -> dict[str, Array]:
    """Trajectories by method, under a progress bar for each method that goes through the stage and one for the others."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    shown: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True) as bar:

        def advance(of: str, done: int) -> None:
            if of not in shown:
                together = all(method in CLOSED_FORMS for method in of.split())
                shown[of] = bar.add_task(of, total=steps if together else steps * len(STARTS))
            bar.advance(shown[of], done)

        return trajectories(methods, steps=steps, scale=scale, advance=advance)


def save(found: Mapping[str, Array], scale: float, folder: Path) -> list[Path]:
    """Draw the trajectories; the files."""
    from experiments.problems.toy.figure import draw  # noqa: PLC0415 - what is mistyped is reported before matplotlib is loaded

    figure = draw(found, scale)
    files = [folder / "toy.png", folder / "toy.pdf"]
    for file in files:
        figure.savefig(file, dpi=200)
    return files


def ends(found: Mapping[str, Array], scale: float) -> Table:
    """Where each method came to rest, a row for each start."""
    table = Table("method", "start", "a", "b", "L1", "L2", title="last points and their losses")
    for method, path in found.items():
        for start, end in zip(STARTS, path[-1], strict=True):
            numbers = [f"{number:.3f}" for number in (*end, *values(end, scale))]
            table.add_row(method, f"({start[0]:g}, {start[1]:g})", *numbers)
    return table


if __name__ == "__main__":
    sys.exit(main())
