"""Make molecules.npz: every small molecule of C, N, O and F, with its structure and 11 properties from GFN2-xTB.

python experiments/datasets/molecules/make.py --processes=2

Takes about ten minutes of one core, and needs the extra "molecules". The checkpoint file stores finished molecules, one line of
JSON each, so that an interrupted run can be resumed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rdkit import RDLogger

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that the script runs from any directory

from experiments.datasets.molecules import FILE
from experiments.datasets.molecules.enumeration import enumerate_smiles
from experiments.datasets.molecules.xtb import Outcome, compute

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="molecules at a time (default: 2)")
    parser.add_argument("--most", type=int, default=5, metavar="N", help="heavy atoms of the largest (default: 5)")
    parser.add_argument("--checkpoint", type=Path, default=Path("molecules.jsonl"), metavar="FILE", help="finished molecules")
    parser.add_argument("--output", type=Path, default=FILE, metavar="FILE", help=f"(default: {FILE.name} next to the script)")
    options = parser.parse_args(arguments)
    outcomes = compute_all(enumerate_smiles(most=options.most), options.checkpoint, options.processes)
    minima = [outcome for outcome in outcomes if not outcome.reason]
    write(minima, options.output)
    for reason, count in Counter(outcome.reason.partition(":")[0] or "minimum" for outcome in outcomes).most_common():
        print(f"{count:5d}  {reason}")
    print(f"{options.output}: {options.output.stat().st_size} bytes, sha256 {sha256(options.output.read_bytes()).hexdigest()}")


def compute_all(smiles: Sequence[str], checkpoint: Path, processes: int) -> list[Outcome]:
    """Return outcomes in the order of ``smiles``; take finished ones from the checkpoint, and add new ones to it."""
    finished: dict[str, Outcome] = {}
    if checkpoint.is_file():
        lines = checkpoint.read_text(encoding="utf-8").splitlines()
        finished = {outcome.smiles: outcome for outcome in (Outcome(**json.loads(line)) for line in lines)}
    rest = [one for one in smiles if one not in finished]
    print(f"{len(smiles)} molecules, of which {len(smiles) - len(rest)} are finished")
    RDLogger.DisableLog("rdApp.*")
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool, checkpoint.open("a", encoding="utf-8") as file:
        for count, outcome in enumerate(pool.map(compute, rest), start=1):
            finished[outcome.smiles] = outcome
            file.write(json.dumps(outcome._asdict()) + "\n")
            file.flush()
            if count % 100 == 0:
                print(f"{count} of {len(rest)}")
    return [finished[one] for one in smiles]


def write(molecules: Sequence[Outcome], file: Path) -> None:
    """Write one compressed file: rows of molecules, and rows of atoms and bonds, one molecule after the other."""
    np.savez_compressed(
        file,
        smiles=np.array([molecule.smiles for molecule in molecules]),
        atom_counts=np.array([len(molecule.numbers) for molecule in molecules], dtype=np.uint8),
        bond_counts=np.array([len(molecule.bonds) for molecule in molecules], dtype=np.uint8),
        numbers=np.concatenate([np.array(molecule.numbers, dtype=np.uint8) for molecule in molecules]),
        positions=np.concatenate([np.array(molecule.positions, dtype=np.float32) for molecule in molecules]),
        bonds=np.concatenate([np.array(molecule.bonds, dtype=np.uint8) for molecule in molecules]),
        targets=np.array([molecule.targets for molecule in molecules], dtype=np.float64),
    )


if __name__ == "__main__":
    main()
