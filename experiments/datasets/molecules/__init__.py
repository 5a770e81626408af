"""Molecules that ship with the project: 2 to 5 heavy atoms of C, N, O and F, with properties from GFN2-xTB.

README.md in this folder describes them, and `make.py` computes them. Reading them needs neither RDKit nor tblite.
"""

from __future__ import annotations

from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE = Path(__file__).with_name("molecules.npz")
SHA256 = "d5be519508a41aa1ab641775d3a627261b94e3d339cf7c8ac5bc51fb91f6145c"


class Molecules(NamedTuple):
    """M molecules with N atoms and E bonds in all, one molecule after the other."""

    smiles: NDArray[np.str_]  # (M,)
    atom_counts: NDArray[np.uint8]  # (M,)
    bond_counts: NDArray[np.uint8]  # (M,)
    numbers: NDArray[np.uint8]  # atomic numbers. (N,)
    positions: NDArray[np.float32]  # Angstrom, about the centre of mass. (N, 3)
    bonds: NDArray[np.uint8]  # first and second atom, counted within the molecule, and order 1 to 3. (E, 3)
    targets: NDArray[np.float64]  # order and units of the benchmark on QM9, energies in eV. (M, 11)


def read(file: Path = FILE, checksum: str = SHA256) -> Molecules:
    """Read the molecules, smallest first.

    Args:
        file: File that `make.py` has written.
        checksum: Its SHA-256.

    Returns:
        The molecules.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it has another checksum.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing. Restore it, or make it with {Path(__file__).with_name('make.py')}.")
    content = file.read_bytes()
    actual = sha256(content).hexdigest()
    if actual != checksum:
        raise ValueError(
            f"{file} ({len(content)} bytes) must have the sha256 {checksum}, but has {actual}. "
            "It is truncated or changed. Restore it."
        )
    with np.load(BytesIO(content)) as arrays:
        named: dict[str, Any] = {name: arrays[name] for name in Molecules._fields}
    return Molecules(**named)
