"""Structures and properties of molecules with GFN2-xTB, by tblite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rdkit import Chem
from rdkit.Chem import AllChem
from scipy.constants import physical_constants
from scipy.optimize import minimize
from tblite.interface import Calculator

from experiments.datasets.molecules.thermochemistry import (
    centred,
    free_atom,
    frequencies,
    masses_of,
    thermochemistry,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.datasets.molecules.thermochemistry import Array

BOHR = physical_constants["Bohr radius"][0] * 1e10  # Angstrom
HARTREE = physical_constants["Hartree energy in eV"][0]
DEBYE = 2.541746473  # in e a0
CALORIES = physical_constants["Avogadro constant"][0] * physical_constants["Hartree energy"][0] / 4.184  # Eh to cal/mol
FREE_ATOMS = {1: -0.39348276, 6: -1.79329637, 7: -2.60582416, 8: -3.76760695, 9: -4.61933996}  # GFN2-xTB, Eh
ACCURACY = 0.01  # of the self-consistency, against tblite's 1: a numerical Hessian needs quiet gradients
GRADIENT = 1e-4  # Eh / a0: largest entry at a minimum
FIELD = 1e-3  # Eh / (e a0)
STEP = 0.01  # a0
BONDED = 0.5  # least bond order


class Outcome(NamedTuple):
    """The result for a molecule: its reason is empty if it is a minimum with the bonds of its SMILES."""

    smiles: str
    reason: str
    numbers: Sequence[int] = ()  # atomic numbers, hydrogens included
    bonds: Sequence[Sequence[int]] = ()  # first atom, second atom, order
    positions: Sequence[Sequence[float]] = ()  # Angstrom, about the centre of mass
    targets: Sequence[float] = ()  # see `properties`


def compute(smiles: str) -> Outcome:
    """Compute the structure and the 11 properties of a molecule from its SMILES."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    Chem.Kekulize(molecule, clearAromaticFlags=True)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    bonds = [[b.GetBeginAtomIdx(), b.GetEndAtomIdx(), int(b.GetBondTypeAsDouble())] for b in molecule.GetBonds()]
    try:
        positions = optimise(numbers, embed(molecule))
        if bonds_of(numbers, positions) != {frozenset(bond[:2]) for bond in bonds}:
            return Outcome(smiles, "its bonds changed")
        masses = masses_of(numbers)
        modes = frequencies(hessian(numbers, positions), positions, masses)
        if modes[0] <= 0:
            return Outcome(smiles, "imaginary mode")
        targets = properties(numbers, positions, modes)
    except RuntimeError as error:  # tblite raises it as well
        return Outcome(smiles, f"failed: {error}")
    return Outcome(smiles, "", numbers, bonds, (BOHR * centred(positions, masses)).tolist(), targets.tolist())


def embed(molecule: Chem.Mol) -> Array:
    """Compute a first structure, by ETKDG and then the force field MMFF.

    Args:
        molecule: With hydrogens.

    Returns:
        Shape (n, 3), a0.

    Raises:
        RuntimeError: If the embedding fails.
    """
    if AllChem.EmbedMolecule(molecule, randomSeed=0) != 0 and (
        AllChem.EmbedMolecule(molecule, randomSeed=0, useRandomCoords=True) != 0
    ):
        raise RuntimeError("no structure could be embedded.")
    AllChem.MMFFOptimizeMolecule(molecule, maxIters=1000)
    positions: Array = molecule.GetConformer().GetPositions() / BOHR
    return positions


def calculator(numbers: Sequence[int], positions: Array, field: Sequence[float] | None = None) -> Any:
    """Return GFN2-xTB for one molecule, in a uniform electric field if one is given, Eh / (e a0)."""
    silent = Calculator("GFN2-xTB", np.array(numbers), positions)
    silent.set("verbosity", 0)
    silent.set("accuracy", ACCURACY)
    if field is not None:
        silent.add("electric-field", list(field))  # an array is a TypeError
    return silent


def optimise(numbers: Sequence[int], positions: Array) -> Array:
    """Compute the nearest minimum of the energy.

    Args:
        numbers: Atomic numbers.
        positions: First structure, a0. Shape (n, 3).

    Returns:
        Shape (n, 3), a0.

    Raises:
        RuntimeError: If it is not reached.
    """
    potential = calculator(numbers, positions)
    result = potential.singlepoint()

    def energy_and_gradient(flat: Array) -> tuple[float, Array]:
        potential.update(positions=flat.reshape(-1, 3))
        potential.singlepoint(result)
        return float(result.get("energy")), result.get("gradient").ravel()

    options = {"gtol": GRADIENT / 10, "ftol": 1e-15, "maxiter": 1000}
    optimum = minimize(energy_and_gradient, positions.ravel(), jac=True, method="L-BFGS-B", options=options)
    left = np.abs(optimum.jac).max()
    if left > GRADIENT:
        raise RuntimeError(f"after {optimum.nit} steps the gradient is still {left:.1e} Eh / a0.")
    minimum: Array = optimum.x.reshape(-1, 3)
    return minimum


def bonds_of(numbers: Sequence[int], positions: Array) -> set[frozenset[int]]:
    """Return the pairs of atoms with a bond order of at least a half (Wiberg, from GFN2-xTB)."""
    orders = calculator(numbers, positions).singlepoint().get("bond-orders").reshape(len(numbers), len(numbers))
    first, second = np.nonzero(np.triu(orders, 1) >= BONDED)
    return {frozenset(pair) for pair in zip(first.tolist(), second.tolist(), strict=True)}


def hessian(numbers: Sequence[int], positions: Array) -> Array:
    """Compute second derivatives by central differences of the gradient. Shape (3n, 3n), Eh / a0^2."""
    potential = calculator(numbers, positions)
    result = potential.singlepoint()
    rows = []
    for step in STEP * np.eye(positions.size):
        gradients = []
        for sign in (1, -1):
            potential.update(positions=positions + sign * step.reshape(-1, 3))
            potential.singlepoint(result)
            gradients.append(result.get("gradient").ravel())
        rows.append((gradients[0] - gradients[1]) / (2 * STEP))
    second = np.array(rows)
    symmetric: Array = (second + second.T) / 2
    return symmetric


def polarizability(numbers: Sequence[int], positions: Array) -> float:
    """Compute a third of the trace of the dipole moment's derivative by the field, by central differences, a0^3."""
    trace = 0.0
    for axis in range(3):
        dipoles = []
        for sign in (1, -1):
            field = [0.0, 0.0, 0.0]
            field[axis] = sign * FIELD
            dipoles.append(calculator(numbers, positions, field).singlepoint().get("dipole")[axis])
        trace += (dipoles[0] - dipoles[1]) / (2 * FIELD)
    return trace / 3


def properties(numbers: Sequence[int], positions: Array, modes: Array) -> Array:
    """Compute the 11 targets, in the order and the units of the benchmark on QM9.

    Args:
        numbers: Atomic numbers.
        positions: A minimum, a0. Shape (n, 3).
        modes: Its angular frequencies, Eh.

    Returns:
        Dipole moment (D), polarizability (a0^3), HOMO and LUMO (eV), electronic spatial extent (a0^2). Then zero-point energy,
        atomisation energies at 0 K and 298.15 K, atomisation enthalpy and free energy at 298.15 K (eV). Last, heat capacity
        (cal / mol K). Shape (11,).

    Differs from QM9: GFN2-xTB instead of B3LYP/6-31G(2df,p), and the spatial extent counts the electrons of each atom
    at its nucleus, about the centre of mass.
    """
    result = calculator(numbers, positions).singlepoint()
    occupied = int((result.get("orbital-occupations") > 1).sum())
    orbitals = result.get("orbital-energies")
    masses = masses_of(numbers)
    electrons = np.array(numbers) - result.get("charges")
    extent = electrons @ (centred(positions, masses) ** 2).sum(1)
    motion = thermochemistry(modes, positions, masses)
    binding = result.get("energy") - sum(FREE_ATOMS[number] for number in numbers)
    atoms = [free_atom(number) for number in numbers]
    energies = [
        orbitals[occupied - 1],
        orbitals[occupied],
        motion.zero_point,
        binding + motion.zero_point,
        binding + motion.energy - sum(atom.energy for atom in atoms),
        binding + motion.enthalpy - sum(atom.enthalpy for atom in atoms),
        binding + motion.free_energy - sum(atom.free_energy for atom in atoms),
    ]
    homo, lumo, *rest = (HARTREE * energy for energy in energies)
    dipole = DEBYE * np.linalg.norm(result.get("dipole"))
    return np.array([dipole, polarizability(numbers, positions), homo, lumo, extent, *rest, CALORIES * motion.heat_capacity])
