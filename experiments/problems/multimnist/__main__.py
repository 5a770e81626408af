"""Train the configurations of the published comparison on overlapping digits and draw them: comparison.png and .pdf.

python -m experiments.problems.multimnist --output figures --epochs 20 --seeds 3
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.problems.base import PROTOCOLS
from experiments.problems.multimnist.comparison import CONFIGURATIONS, DRAWN, IMBALANCE, Result, Settings, compare, summary
from experiments.problems.multimnist.data import DataConfig

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 after a drawn figure, 2 for a mistake in the command, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    settings = Settings(
        epochs=options.epochs,
        batch_size=options.batch_size or (64 if options.data_path is None else 128),
        data=DataConfig("digits" if options.data_path is None else "mnist", options.data_path, options.protocol),
    )
    console = Console()
    begin = time.perf_counter()
    try:
        results = run(options.configurations, options.seeds, settings, options.output, console)
    except (ValueError, TypeError, OSError) as error:
        build_parser().error(str(error))
    except KeyboardInterrupt:
        console.print("Interrupted. Nothing was drawn; the JSON files of finished runs stay.")
        return 130
    from experiments.problems.multimnist.figure import draw  # noqa: PLC0415 - what is mistyped is reported before matplotlib is loaded

    figure = draw(results, settings)
    files = [options.output / "comparison.png", options.output / "comparison.pdf"]
    for file in files:
        figure.savefig(file, dpi=200)
    console.print(table_of(results))
    console.print(f"{time.perf_counter() - begin:.1f} s. Saved {', '.join(map(str, files))}", soft_wrap=True)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """What the comparison is of, and how long it takes."""
    sentence, _, example = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.problems.multimnist",
        description=sentence,
        epilog=f"example:\n  {example.strip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="where figure and results are written")
    parser.add_argument("--epochs", metavar="N", type=int, default=20, help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", metavar="S", type=int, default=1, help="runs of each configuration (default: %(default)s)")
    parser.add_argument(
        "--configurations",
        metavar="NAME",
        nargs="+",
        default=DRAWN,
        help=f"some of {', '.join(CONFIGURATIONS)} (default: %(default)s)",
    )
    parser.add_argument("--data_path", metavar="FOLDER", help="with the files of MNIST (default: the digits of scikit-learn)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="sound", help="of MNIST (default: %(default)s)")
    parser.add_argument("--batch_size", metavar="N", type=int, help="default: 64 for digits, 128 for MNIST")
    return parser


def run(configurations: Sequence[str], seeds: int, settings: Settings, folder: Path, console: Console) -> list[Result]:
    """All runs, under a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    names = list(dict.fromkeys(configurations))
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task("", total=2 * len(names) * seeds * settings.epochs)
        return compare(names, seeds, settings, folder, advance=lambda label: bar.update(shown, advance=1, description=label))


def table_of(results: Sequence[Result]) -> Table:
    """Test accuracies: mean ± standard deviation over the seeds."""
    table = Table("configuration", f"left (x 1), right x {IMBALANCE:g}", "balanced", title="test accuracy of left / right (%)")
    found = summary(results)
    for name in dict.fromkeys(result.configuration for result in results):
        cells = []
        for imbalance in (IMBALANCE, 1.0):
            shown = []
            for task in ("left", "right"):
                values = 100 * np.array(found.get((name, imbalance, task), []))
                spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
                shown.append(f"{values.mean():.1f}{spread}" if len(values) else "-")
            cells.append(" / ".join(shown))
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
