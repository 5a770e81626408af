"""Thermochemistry of rigid rotor, harmonic oscillator and ideal gas: energies at room temperature from a Hessian.

Everything is in atomic units: energies in Hartree (Eh), lengths in Bohr (a0), masses in electron masses, temperature times
Boltzmann's constant in Eh. The reduced Planck constant is 1, so that an angular frequency is an energy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.constants import physical_constants

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

BOLTZMANN = physical_constants["kelvin-hartree relationship"][0]  # Eh / K
AMU = physical_constants["unified atomic mass unit"][0] / physical_constants["electron mass"][0]
PASCAL = physical_constants["atomic unit of length"][0] ** 3 / physical_constants["atomic unit of energy"][0]  # Eh / a0^3
TEMPERATURE = 298.15  # K; temperature and pressure as in QM9
PRESSURE = 101325 * PASCAL
MASSES = {1: 1.00782503, 6: 12.0, 7: 14.0030740, 8: 15.9949146, 9: 18.9984032}  # of the most common isotope, u
MULTIPLICITIES = {1: 2, 6: 3, 7: 4, 8: 3, 9: 2}  # of the free atoms in their ground states
LINEAR = 1e-3  # ratio of the least to the largest moment of inertia


class Thermochemistry(NamedTuple):
    """Contributions of motion to the energy of the clamped nuclei."""

    zero_point: float  # Eh
    energy: float  # U - E, Eh, the zero-point energy included
    enthalpy: float  # H - E, Eh
    free_energy: float  # G - E, Eh
    entropy: float  # Eh / K
    heat_capacity: float  # at constant volume, Eh / K


def masses_of(numbers: Sequence[int]) -> Array:
    """Return masses in electron masses, by atomic number. Shape (n,)."""
    masses: Array = AMU * np.array([MASSES[number] for number in numbers])
    return masses


def centred(positions: Array, masses: Array) -> Array:
    """Return positions about the centre of mass. Shape (n, 3)."""
    about_centre: Array = positions - masses @ positions / masses.sum()
    return about_centre


def moments_of_inertia(positions: Array, masses: Array) -> Array:
    """Return the principal moments of inertia, ascending. Shape (3,)."""
    r = centred(positions, masses)
    squares = (r**2).sum(1)
    inertia = (masses * squares).sum() * np.eye(3) - np.einsum("a,ai,aj->ij", masses, r, r)
    moments: Array = np.linalg.eigvalsh(inertia)
    return moments


def is_linear(positions: Array, masses: Array) -> bool:
    """Return whether a molecule has only two rotations."""
    moments = moments_of_inertia(positions, masses)
    return bool(moments[0] < LINEAR * moments[2])


def frequencies(hessian: Array, positions: Array, masses: Array) -> Array:
    r"""Compute the angular frequencies of the vibrations, with translations and rotations projected out.

    Args:
        hessian: Second derivatives of the energy, Eh / a0^2. Shape (3n, 3n).
        positions: a0. Shape (n, 3).
        masses: Shape (n,).

    Returns:
        Ascending, in Eh; an imaginary frequency is negative. Shape (3n - 6,), or (3n - 5,) if linear.
    """
    roots = np.sqrt(masses)
    r = centred(positions, masses)
    rigid = [np.outer(roots, axis).ravel() for axis in np.eye(3)]
    rigid += [(roots[:, None] * np.cross(axis, r)).ravel() for axis in np.eye(3)]
    number = 5 if is_linear(positions, masses) else 6
    every = np.linalg.svd(np.array(rigid).T, full_matrices=True)[0]
    vibrations = every[:, number:]  # the first are an orthonormal basis of the rigid motions
    weighted = hessian / np.outer(np.repeat(roots, 3), np.repeat(roots, 3))
    squares = np.linalg.eigvalsh(vibrations.T @ weighted @ vibrations)
    signed: Array = np.sign(squares) * np.sqrt(np.abs(squares))
    return signed


def thermochemistry(modes: Array, positions: Array, masses: Array, temperature: float = TEMPERATURE) -> Thermochemistry:
    """Compute the thermochemistry of a molecule in its electronic ground state, a singlet.

    Args:
        modes: Real angular frequencies, Eh. Shape (3n - 6,) or (3n - 5,).
        positions: a0. Shape (n, 3).
        masses: Shape (n,).
        temperature: K.

    Returns:
        Contributions to the energy.

    Source:
        Textbook statistical mechanics. Differs from QM9: the symmetry number is always 1, so that the entropy of a
        symmetric molecule is too large (water by R ln 2).
    """
    kT = BOLTZMANN * temperature
    x = modes / kT
    occupations = 1 / np.expm1(x)
    zero_point = modes.sum() / 2
    vibration = zero_point + (modes * occupations).sum()
    vibration_entropy = (x * occupations - np.log1p(-np.exp(-x))).sum()
    vibration_capacity = (x**2 * occupations * (occupations + 1)).sum()
    constants = kT * 2 * moments_of_inertia(positions, masses)  # kT over each rotational constant
    if is_linear(positions, masses):
        rotations, rotation_entropy = 2, np.log(constants[2]) + 1
    else:
        rotations, rotation_entropy = 3, np.log(np.sqrt(np.pi * constants.prod())) + 1.5
    energy = vibration + (3 + rotations) / 2 * kT
    entropy = BOLTZMANN * (translational_entropy(masses.sum(), kT) + rotation_entropy + vibration_entropy)
    return Thermochemistry(
        zero_point=float(zero_point),
        energy=float(energy),
        enthalpy=float(energy + kT),
        free_energy=float(energy + kT - temperature * entropy),
        entropy=float(entropy),
        heat_capacity=float(BOLTZMANN * ((3 + rotations) / 2 + vibration_capacity)),
    )


def free_atom(number: int, temperature: float = TEMPERATURE) -> Thermochemistry:
    """Compute the thermochemistry of an atom in its ground state; spin adds to the entropy, as in QM9's references."""
    kT = BOLTZMANN * temperature
    mass = AMU * MASSES[number]
    entropy = BOLTZMANN * (translational_entropy(mass, kT) + np.log(MULTIPLICITIES[number]))
    return Thermochemistry(0.0, 1.5 * kT, 2.5 * kT, 2.5 * kT - temperature * float(entropy), float(entropy), 1.5 * BOLTZMANN)


def translational_entropy(mass: float, kT: float) -> float:
    """Return the entropy of an ideal gas (Sackur and Tetrode), in units of Boltzmann's constant."""
    return float(1.5 * np.log(mass * kT / (2 * np.pi)) + np.log(kT / PRESSURE) + 2.5)
