"""QM9 with a few molecules, in the format of its publication."""

import numpy as np

from experiments.datasets import molecules

CSV_HEADER = "mol_id,A,B,C,mu,alpha,homo,lumo,gap,r2,zpve,u0,u298,h298,g298,cv,u0_atom,u298_atom,h298_atom,g298_atom"
SYMBOLS = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}


def pieces(count):
    """Return atomic numbers, positions and bonds of the first molecules that ship with the project."""
    source = molecules.read()
    atoms, bonds = np.cumsum(source.atom_counts.astype(int)), np.cumsum(source.bond_counts.astype(int))
    return [
        (
            source.numbers[atoms[k] - source.atom_counts[k] : atoms[k]],
            source.positions[atoms[k] - source.atom_counts[k] : atoms[k]],
            source.bonds[bonds[k] - source.bond_counts[k] : bonds[k]].astype(int),
        )
        for k in range(count)
    ]


def write_qm9(folder, count=6, excluded=(3,)):
    """Write the three files, and return the values of the table."""
    raw = folder / "raw"
    raw.mkdir(parents=True)
    records = []
    for k, (elements, positions, bonds) in enumerate(pieces(count), start=1):
        head = [f"gdb_{k}", "  -OEChem-03231823243D", "", f"{len(elements):3d}{len(bonds):3d}  0     0  0  0  0  0  0999 V2000"]
        atoms = [
            f"{x:10.4f}{y:10.4f}{z:10.4f} {SYMBOLS[int(n)]:<3} 0  0  0  0  0  0  0  0  0  0  0  0"
            for n, (x, y, z) in zip(elements, positions, strict=True)
        ]
        links = [f"{a + 1:3d}{b + 1:3d}{order:3d}  0  0  0  0" for a, b, order in bonds]
        records += [*head, *atoms, *links, "M  END", "$$$$"]
    (raw / "gdb9.sdf").write_text("\n".join(records) + "\n")
    values = np.random.default_rng(0).normal(size=(count, 19)).round(4)
    rows = [f"gdb_{k}," + ",".join(str(value) for value in row) for k, row in enumerate(values.tolist(), start=1)]
    (raw / "gdb9.sdf.csv").write_text("\n".join([CSV_HEADER, *rows]) + "\n")
    listed = [f"  {number:5d}   C#N   {number}" for number in excluded]
    (raw / "uncharacterized.txt").write_text("\n".join([*(["# header"] * 9), *listed, "# footer"]) + "\n")
    return values
