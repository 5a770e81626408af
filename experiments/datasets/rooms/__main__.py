"""Write procedural scenes in the layout of NYUv2 or of CityScapes.

python -m experiments.datasets.rooms --output scenes --layout nyuv2 --train 240 --val 60 --test 60 --height 72 --width 96
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from experiments.datasets.rooms.storage import CONVERTERS, write

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 when the folder is complete, 2 for a mistake in the command."""
    sentence, _, example = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.datasets.rooms", description=sentence, epilog=f"example: {example}", allow_abbrev=False
    )
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder, to which missing scenes are added")
    parser.add_argument("--layout", choices=sorted(CONVERTERS), default="nyuv2", help="default: nyuv2")
    for split, count, seeds in (("train", 240, "0"), ("val", 60, "10000"), ("test", 60, "20000")):
        help_ = f"number of scenes, seeds {seeds} and up (default: {count})"
        parser.add_argument(f"--{split}", metavar="N", type=int, default=count, help=help_)
    parser.add_argument("--height", metavar="PIXELS", type=int, default=72, help="default: 72")
    parser.add_argument("--width", metavar="PIXELS", type=int, default=96, help="default: 96")
    options = parser.parse_args(arguments)
    counts = {"train": options.train, "val": options.val, "test": options.test}
    start = time.perf_counter()
    try:
        rendered = write(options.output, counts, layout=options.layout, height=options.height, width=options.width)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{rendered} scenes rendered in {time.perf_counter() - start:.1f} s. {options.output} has {sum(counts.values())}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
