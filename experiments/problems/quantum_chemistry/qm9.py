"""QM9 from files on disk, in the format of its publication; nothing is downloaded."""

from __future__ import annotations

import csv
import io
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch_geometric.data import Data, InMemoryDataset
from torch_geometric.datasets import QM9
from torch_geometric.io import fs

from experiments.problems.quantum_chemistry.graphs import Graphs, complete, exclusive_sum

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

RAW = ("gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt")
PREPROCESSED = "qm9_v3.pt"  # torch_geometric reads it where RDKit is not installed
PROCESSED = "data_v3.pt"  # torch_geometric writes it
MOLECULES = 133_885
UNCHARACTERIZED = 3_054  # of these, which every benchmark leaves out
HEADER_LINES, FOOTER_LINES = 9, 1  # of the list of uncharacterized molecules
CSV_COLUMNS = 20  # name, three rotational constants, sixteen properties
COLUMNS = [0, 1, 2, 3, 5, 6, 12, 13, 14, 15, 11]  # of torch_geometric's 19 targets: the 11 tasks, energies of atomisation


def read(path: Path) -> Graphs:
    """Read molecules as complete graphs; 130 831 if they are all of QM9.

    The first of these that exists is read:

    1. ``processed/data_v3.pt``, which torch_geometric has written before.
    2. ``raw/gdb9.sdf``, ``raw/gdb9.sdf.csv`` and ``raw/uncharacterized.txt``; torch_geometric converts them with RDKit.
    3. ``raw/qm9_v3.pt``, which torch_geometric provides for users without RDKit.

    Args:
        path: Folder of QM9.

    Returns:
        The molecules.

    Raises:
        FileNotFoundError: If none of them exists.
        ValueError: If a file is truncated, or has other content than its name states.
        ModuleNotFoundError: If RDKit is needed but not installed.
    """
    raw, processed = path / "raw", path / "processed" / PROCESSED
    if not processed.is_file() and (raw / PREPROCESSED).is_file() and not all((raw / name).is_file() for name in RAW):
        return saved(raw / PREPROCESSED, collated)
    if not processed.is_file():
        check(raw)
        if find_spec("rdkit") is None:
            raise ModuleNotFoundError(f"{raw / RAW[0]} can only be read with RDKit: pip install -e . --group molecules.")
        QM9(str(path))
    return saved(processed, lambda content: graphs_of(*content[:2]))


def saved(file: Path, convert: Callable[[Any], Graphs]) -> Graphs:
    """Convert the content of a file that torch_geometric has saved.

    Args:
        file: The file.
        convert: Function from its content to graphs.

    Returns:
        The graphs.

    Raises:
        ValueError: If the file is truncated, or has other content.
    """
    try:
        return convert(fs.torch_load(str(file)))
    except Exception as error:  # noqa: BLE001 - any exception is caused by the content of the file
        remedy = "Copy it again." if file.name == PREPROCESSED else "Remove it; it is made again from the files in raw."
        reason = str(error) if isinstance(error, ValueError) else repr(error).partition("(")[0]
        raise ValueError(f"{file} is truncated, damaged or of something else ({reason}). {remedy}") from None


def collated(molecules: Any) -> Graphs:
    """Convert dicts, one for each molecule."""
    data, slices = InMemoryDataset.collate([Data(**molecule) for molecule in molecules])
    return graphs_of(data.to_dict(), slices)


def check(raw: Path) -> None:
    """Refuse raw files that torch_geometric would try to download, or would misread.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is truncated.
    """
    missing = [name for name in RAW if not (raw / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{raw} must have {', '.join(RAW)}, or only {PREPROCESSED}, but has no {', '.join(missing)}. "
            "Put them there; nothing is downloaded."
        )
    sdf, table, excluded = (raw / name for name in RAW)
    structures = sdf.read_bytes()
    count = structures.count(b"$$$$")
    if not structures.rstrip().endswith(b"$$$$"):
        raise ValueError(f"{sdf} is truncated: it must end with $$$$, but does not, after {count} complete molecules.")
    text = table.read_text(encoding="utf-8")
    rows = list(csv.reader(io.StringIO(text)))[1:]
    broken = next((number for number, row in enumerate(rows, start=2) if len(row) != CSV_COLUMNS), None)
    if broken is not None:
        raise ValueError(
            f"{table} is truncated: every line must have {CSV_COLUMNS} values, but line {broken} has {len(rows[broken - 2])}."
        )
    if rows and not text.endswith("\n"):
        raise ValueError(f"{table} is truncated: its last line, {len(rows) + 1}, does not end.")
    if count != len(rows):
        shorter = sdf if count < len(rows) else table
        raise ValueError(f"{shorter} is truncated: {sdf.name} has {count} molecules, but {table.name} {len(rows)}.")
    check_excluded(excluded, count)


def check_excluded(file: Path, count: int) -> None:
    """Refuse a list of excluded molecules that torch_geometric would misread.

    Raises:
        ValueError: If it is truncated, or a number in it exceeds ``count``.
    """
    lines = file.read_text(encoding="utf-8").split("\n")
    if len(lines) < HEADER_LINES + FOOTER_LINES + 1 or lines[-1]:
        raise ValueError(f"{file} is truncated: it must have {HEADER_LINES} lines above and {FOOTER_LINES} below its list.")
    listed = lines[HEADER_LINES : -FOOTER_LINES - 1]
    if count == MOLECULES and len(listed) != UNCHARACTERIZED:
        raise ValueError(f"{file} is truncated: it must list {UNCHARACTERIZED} molecules, but lists {len(listed)}.")
    for number, line in enumerate(listed, start=HEADER_LINES + 1):
        first = line.split()[0] if line.split() else ""
        if not (first.isdigit() and 1 <= int(first) <= count):
            raise ValueError(f"{file}, line {number}: must start with a number from 1 to {count}, but is {line!r}.")


def graphs_of(data: dict[str, Tensor], slices: dict[str, Tensor]) -> Graphs:
    """Convert molecules in the form of torch_geometric: one after the other, atoms counted within each molecule.

    Args:
        data: Tensors of all molecules.
        slices: Start of each molecule in each tensor.

    Returns:
        Complete graphs.

    Raises:
        ValueError: If the numbers of atoms, bonds, molecules or features do not match, or a number is not finite.
    """
    sizes = slices["x"].diff()
    atoms, bonds, molecules = int(sizes.sum()), int(slices["edge_index"].diff().sum()), len(sizes)
    shapes = {"x": (atoms, 11), "pos": (atoms, 3), "edge_index": (2, bonds), "edge_attr": (bonds, 4), "y": (molecules, 19)}
    for name, shape in shapes.items():
        if data[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, but has {tuple(data[name].shape)}")
        if not data[name].isfinite().all():
            raise ValueError(f"{name} has a number that is not finite")
    bonds_each = slices["edge_index"].diff()
    pairs = data["edge_index"] + exclusive_sum(sizes).repeat_interleave(bonds_each)
    targets = data["y"][:, COLUMNS].double()
    return complete(sizes, data["x"], data["pos"], pairs, data["edge_attr"].argmax(1), targets)
