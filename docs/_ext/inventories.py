"""Inventories of other projects' names, stored here so that a build needs no network.

Each file in ``docs/_inventories`` is text: a first line with the project's address, then one line for each name, in the form
of Sphinx's inventories: name, domain and role, priority, page, and displayed name.
"""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "_inventories"
HEADER = "# Sphinx inventory version 2\n# Project: {name}\n# Version:\n# The remainder of this file is compressed using zlib.\n"


def local_mapping() -> dict[str, tuple[str, str]]:
    """Return the value of ``intersphinx_mapping``: address and compressed inventory by project."""
    target = Path(tempfile.mkdtemp(prefix="inventories-"))
    return {file.stem: compressed(file, target / f"{file.stem}.inv") for file in sorted(FOLDER.glob("*.txt"))}


def compressed(source: Path, target: Path) -> tuple[str, str]:
    """Write a text file as an inventory that Sphinx reads, and return the project's address and the path of the inventory."""
    address, _, lines = source.read_text(encoding="utf-8").partition("\n")
    target.write_bytes(HEADER.format(name=source.stem).encode() + zlib.compress(lines.encode()))
    return address, str(target)
