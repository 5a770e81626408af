"""Command line of the library.

python -m balance methods         a table of all methods
python -m balance methods NAME    the page of one
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from .catalogue import page, table

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 2 if no method has the given name."""
    name = build_parser().parse_args(arguments).name
    try:
        print(table() if name is None else page(name), flush=True)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m balance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    purpose = "print the methods, with their needs, state, cost and paper"
    methods = commands.add_parser("methods", help=purpose, description=purpose)
    methods.add_argument("name", nargs="?", help="print the page of this method")
    return parser


if __name__ == "__main__":
    sys.exit(main())
