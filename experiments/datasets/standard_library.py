"""Functions and text of the standard library of the running Python, split by source file.

The content depends on the installed Python, and is deterministic for one version. A hash of the path decides the split of a
file. A function whose code occurs in an earlier file is left out, so that no copy of it lies in another split.
"""

from __future__ import annotations

import ast
import hashlib
import json
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


def sources(split: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield relative path and text of the files of a split, or of all files, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if LEFT_OUT.isdisjoint(path.parts) and not path.name.startswith("_sysconfigdata"):
            name = path.as_posix()
            if split is None or split == split_of(name):
                yield name, file.read_text(encoding="utf-8")


def split_of(path: str) -> str:
    """Return the split of a file: a tenth of the paths is validation, a tenth is test."""
    bucket = hashlib.sha256(path.encode()).digest()[0] % 10
    return SPLITS[max(bucket - 7, 0)]


def functions(cache: Path) -> list[Function]:
    """Return the functions of the library that are at most `LONGEST` characters long; read them once.

    Args:
        cache: Folder of the file that keeps them.

    Returns:
        Functions in the order of files and lines.

    Raises:
        OSError: If ``cache`` cannot be written.
    """
    key = hashlib.sha256(Path(__file__).read_bytes() + platform.python_version().encode()).hexdigest()[:12]
    file = cache / f"functions-{platform.python_version()}-{key}.json"
    build_once(file, file.exists, lambda partial: partial.write_text(json.dumps(list(_collect())), encoding="utf-8") and None)
    return [Function(*entry) for entry in json.loads(file.read_text(encoding="utf-8"))]


def _collect() -> Iterator[Function]:
    """Yield the functions of all files, each code once."""
    seen = set()
    for path, text in sources():
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
