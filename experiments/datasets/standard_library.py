"""Functions and text of the standard library of the running Python, split by source file.

The content depends on the installed Python, and is deterministic for one version. A hash of the path decides the split of a
file. A function whose code occurs in an earlier file is left out, so that no copy of it lies in another split.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import json
import os
import platform
import sysconfig
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from experiments.datasets.image_cache import build_once

if TYPE_CHECKING:
    from collections.abc import Iterator

SPLITS = ("train", "validation", "test")
LEFT_OUT = frozenset(  # folders whose content is no library code, or differs between distributions of one version
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip", "turtledemo"}
    | {"pydoc_data", "__pycache__"}
)
LONGEST = 400  # characters of code and docstring


class Function(NamedTuple):
    """A function, with or without a docstring.

    Attributes:
        split: One of `SPLITS`.
        file: Path of its file, relative to the library.
        name: Its name.
        header: The lines before the docstring, or before the body.
        docstring: First line of the docstring; empty without one.
        body: The lines after the docstring.
    """

    split: str
    file: str
    name: str
    header: str
    docstring: str
    body: str


def sources(split: str, files: int | None = None) -> Iterator[tuple[str, str]]:
    """Yield relative path and text of the first files of a split, in the order of their paths; of all files with None."""
    root = Path(sysconfig.get_paths()["stdlib"])
    of_split = (path for path in _paths(root) if split_of(path) == split)
    for path in itertools.islice(of_split, files):
        yield path, (root / path).read_text(encoding="utf-8")


@functools.cache
def _paths(root: Path) -> tuple[str, ...]:
    """Return the sorted relative paths of the files that count."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        relative = Path(folder).relative_to(root)
        found += [(relative / name).as_posix() for name in names if name.endswith(".py")]
    return tuple(sorted(path for path in found if "_sysconfigdata" not in path))


def split_of(path: str) -> str:
    """Return the split of a file: a tenth of the paths is validation, a tenth is test."""
    bucket = hashlib.sha256(path.encode()).digest()[0] % 10
    return SPLITS[max(bucket - 7, 0)]


def functions(cache: Path, files: int | None = None) -> list[Function]:
    """Return the functions of the library that are at most `LONGEST` characters long; read them once.

    Args:
        cache: Folder of the file that keeps them.
        files: Number of files of each split, the first ones; None for all.

    Returns:
        Functions in the order of files and lines.

    Raises:
        OSError: If ``cache`` cannot be written.
    """
    key = hashlib.sha256(f"{files}".encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    file = cache / f"functions-{platform.python_version()}-{key}.json"

    def write(partial: Path) -> None:
        partial.write_text(json.dumps(list(_collect(files))), encoding="utf-8")

    build_once(file, file.exists, write)
    return [Function(*entry) for entry in json.loads(file.read_text(encoding="utf-8"))]


def _collect(files: int | None) -> Iterator[Function]:
    """Yield the functions of the files, each code once."""
    seen = set()
    for path, text in (source for split in SPLITS for source in sources(split, files)):
        for name, header, docstring, body in parsed(text):
            code = "".join((header + body).split())
            if code not in seen and len(header + docstring + body) <= LONGEST:
                yield Function(split_of(path), path, name, header, docstring, body)
            seen.add(code)


def parsed(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, header, first line of the docstring, and body of the functions of a source.

    Functions without a body after the docstring, and functions on a single line, are left out.

    Args:
        text: The source.

    Yields:
        Four texts; header and body without common indentation.
    """
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        docstring = ast.get_docstring(node) or ""
        first, rest = node.body[0], node.body[1 if docstring else 0 :]
        last = (first.end_lineno or 0) if docstring else first.lineno - 1  # line before the body
        if rest and node.lineno < first.lineno and last < rest[0].lineno:
            header, body = lines[node.lineno - 1 : first.lineno - 1], lines[last : node.end_lineno]
            code = textwrap.dedent("".join(header + body)).splitlines(keepends=True)
            summary = docstring.strip().partition("\n")[0]
            yield node.name, "".join(code[: len(header)]), summary, "".join(code[len(header) :])
