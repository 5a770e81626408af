import shutil

import numpy as np
import pytest
from scipy.constants import R, physical_constants

from experiments.datasets.molecules import FILE, read
from experiments.datasets.molecules.thermochemistry import (
    AMU,
    BOLTZMANN,
    centred,
    free_atom,
    frequencies,
    is_linear,
    masses_of,
    moments_of_inertia,
    thermochemistry,
)

BOHR = physical_constants["Bohr radius"][0] * 1e10
WAVENUMBER = physical_constants["inverse meter-hartree relationship"][0] * 100  # Eh per cm^-1
CALORIES = R / 4.184 / BOLTZMANN  # cal / mol K per Eh / K
MU, ALPHA, HOMO, LUMO, R2, ZPVE, U0, U, H, G, CV = range(11)
WATER = [8, 1, 1], np.array([[0, 0, 0], [0, 0.757, 0.587], [0, -0.757, 0.587]]) / BOHR
CARBON_DIOXIDE = [6, 8, 8], np.array([[0, 0, 0], [0, 0, 1.162], [0, 0, -1.162]]) / BOHR


@pytest.fixture(scope="module")
def molecules():
    return read()


def by_molecule(molecules):
    """Atomic numbers, positions and bonds of each."""
    atoms = np.cumsum(molecules.atom_counts.astype(int))[:-1]
    bonds = np.cumsum(molecules.bond_counts.astype(int))[:-1]
    numbers, positions = np.split(molecules.numbers, atoms), np.split(molecules.positions, atoms)
    return list(zip(numbers, positions, np.split(molecules.bonds, bonds), strict=True))


def test_what_ships_is_small_and_consistent(molecules):
    count = len(molecules.smiles)
    assert FILE.stat().st_size < 400_000
    assert count > 1200
    assert len(set(molecules.smiles.tolist())) == count
    assert molecules.targets.shape == (count, 11)
    assert molecules.targets.dtype == np.float64
    assert molecules.positions.dtype == np.float32
    assert np.isfinite(molecules.targets).all()
    assert len(molecules.positions) == len(molecules.numbers) == molecules.atom_counts.sum()
    assert len(molecules.bonds) == molecules.bond_counts.sum()
    assert set(molecules.numbers.tolist()) == {1, 6, 7, 8, 9}


def test_every_atom_has_its_valence_and_bonded_atoms_are_near(molecules):
    valences = {1: 1, 6: 4, 7: 3, 8: 2, 9: 1}
    for numbers, positions, bonds in by_molecule(molecules):
        first, second, order = bonds.astype(int).T
        assert (np.bincount(first, order, len(numbers)) + np.bincount(second, order, len(numbers))).tolist() == [
            valences[number] for number in numbers
        ]
        lengths = np.linalg.norm(positions[first] - positions[second], axis=1)
        assert lengths.min() > 0.9
        assert lengths.max() < 1.8


def test_positions_are_about_the_centre_of_mass(molecules):
    for numbers, positions, _ in by_molecule(molecules)[::50]:
        np.testing.assert_allclose(centred(positions, masses_of(numbers.tolist())), positions, atol=1e-5)


def test_targets_are_physical_and_their_correlations_are_those_of_qm9(molecules):
    targets = molecules.targets
    assert (targets[:, [MU, ALPHA, R2, ZPVE, CV]] >= 0).all()
    assert (targets[:, HOMO] < targets[:, LUMO]).all()
    assert (targets[:, U] > targets[:, U0] - 1).all()
    assert (targets[:, U0] > targets[:, U]).all()  # heat makes free atoms richer than the molecule
    assert (targets[:, U] > targets[:, H]).all()
    assert (targets[:, G] > targets[:, H]).all()  # entropy favours the free atoms
    correlations = np.corrcoef(targets.T)
    assert correlations[np.ix_([U0, U, H, G], [U0, U, H, G])].min() > 0.999
    assert np.abs(np.delete(correlations[MU], MU)).max() < 0.5
    assert correlations[ZPVE, CV] > 0.6
    np.testing.assert_allclose(targets.mean(0)[[ALPHA, HOMO, ZPVE, U0, CV]], [25.2, -10.68, 2.04, -53.4, 17.7], rtol=0.05)


def test_a_damaged_or_missing_file_is_named(tmp_path):
    copy = shutil.copy(FILE, tmp_path / "copy.npz")
    assert len(read(copy).smiles) == len(read().smiles)
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"copy\.npz .* must have the sha256 .* truncated or changed"):
        read(copy)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz is missing"):
        read(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    ("molecule", "wavenumbers", "entropy", "capacity"),
    [  # measured, at 1 bar: third-law entropies, and C_p - R. The measured entropies know of the symmetry: R ln 2 less
        (WATER, [1595, 3657, 3756], 188.8 / 4.184, (33.6 - R) / 4.184),
        (CARBON_DIOXIDE, [667, 667, 1333, 2349], 213.8 / 4.184, (37.1 - R) / 4.184),
    ],
)
def test_entropy_and_heat_capacity_are_the_measured_ones(molecule, wavenumbers, entropy, capacity):
    numbers, positions = molecule
    computed = thermochemistry(WAVENUMBER * np.array(wavenumbers, dtype=float), positions, masses_of(numbers))
    assert CALORIES * computed.entropy - R / 4.184 * np.log(2) == pytest.approx(entropy, rel=0.003)
    assert CALORIES * computed.heat_capacity == pytest.approx(capacity, rel=0.005)
    assert computed.zero_point == pytest.approx(WAVENUMBER * sum(wavenumbers) / 2)
    assert computed.enthalpy - computed.energy == pytest.approx(BOLTZMANN * 298.15)
    assert computed.free_energy == pytest.approx(computed.enthalpy - 298.15 * computed.entropy)


def test_heat_capacity_is_the_slope_of_the_energy():
    numbers, positions = WATER
    masses = masses_of(numbers)
    modes = WAVENUMBER * np.array([300.0, 900.0, 3000.0])
    lower, middle, upper = (thermochemistry(modes, positions, masses, t) for t in (299, 300, 301))
    assert (upper.energy - lower.energy) / 2 == pytest.approx(middle.heat_capacity, rel=1e-4)
    assert (lower.free_energy - upper.free_energy) / 2 == pytest.approx(middle.entropy, rel=1e-2)  # pressure is constant


@pytest.mark.parametrize(
    ("number", "hartree"), [(1, -0.510927 + 0.497912), (6, -37.861317 + 37.844411), (8, -75.079532 + 75.062219)]
)
def test_free_atoms_have_the_entropy_of_qm9s_references(number, hartree):
    """The references of QM9 for B3LYP: G - H, which does not depend on the electronic structure."""
    atom = free_atom(number)
    assert atom.free_energy - atom.enthalpy == pytest.approx(hartree, abs=2e-6)


def test_frequencies_of_a_spring_and_what_is_left_of_rigid_motions():
    masses = AMU * np.array([1.0, 35.0])
    positions = np.array([[0.3, 0.1, 0.0], [0.3, 0.1, 2.4]])
    spring = np.zeros((6, 6))
    spring[np.ix_([2, 5], [2, 5])] = 0.33 * np.array([[1, -1], [-1, 1]])
    modes = frequencies(spring, positions, masses)
    assert modes == pytest.approx(np.sqrt(0.33 * masses.sum() / masses.prod()))
    assert frequencies(-spring, positions, masses) == pytest.approx(-modes)
    noise = np.random.default_rng(0).standard_normal((9, 9))
    assert len(frequencies(noise + noise.T, WATER[1], masses_of(WATER[0]))) == 3
    assert len(frequencies(noise + noise.T, CARBON_DIOXIDE[1], masses_of(CARBON_DIOXIDE[0]))) == 4


def test_moments_of_inertia():
    numbers, positions = CARBON_DIOXIDE
    masses = masses_of(numbers)
    expected = 2 * masses[1] * positions[1, 2] ** 2
    np.testing.assert_allclose(moments_of_inertia(positions + 1, masses), [0, expected, expected], atol=1e-6 * expected)
    assert is_linear(positions, masses)
    assert not is_linear(WATER[1], masses_of(WATER[0]))


def test_enumeration():
    pytest.importorskip("rdkit")
    from rdkit import Chem

    from experiments.datasets.molecules.enumeration import Graph, enumerate_smiles, smiles_of, wanted

    smiles = enumerate_smiles(2, 4)
    assert smiles[:13] == sorted(["CC", "CN", "CO", "CF", "C=C", "C=N", "C=O", "N=N", "N=O", "O=O", "C#C", "C#N", "N#N"])
    assert len(smiles) == len(set(smiles)) == 13 + 44 + 215
    assert {"CC(C)C", "C1CCC1", "O=C1CC1", "N#CC#N", "C=CC=C"} <= set(smiles)
    assert not {"OO", "NN", "C1=CC1", "C1#CCC1", "C1C2CC12"} & set(smiles)
    for one in smiles:
        assert Chem.MolToSmiles(Chem.MolFromSmiles(one)) == one
    pyrrole = Graph((7, 6, 6, 6, 6), ((0, 1, 1), (1, 2, 2), (2, 3, 1), (3, 4, 2), (4, 0, 1)))
    assert smiles_of(pyrrole) == "c1cc[nH]c1"
    assert wanted(pyrrole)


def test_what_ships_is_what_rdkit_reads_from_its_smiles(molecules):
    chem = pytest.importorskip("rdkit.Chem")
    for smiles, (numbers, _, bonds) in list(zip(molecules.smiles, by_molecule(molecules), strict=True))[::10]:
        molecule = chem.AddHs(chem.MolFromSmiles(str(smiles)))
        chem.Kekulize(molecule, clearAromaticFlags=True)
        assert [atom.GetAtomicNum() for atom in molecule.GetAtoms()] == numbers.tolist()
        assert [
            [b.GetBeginAtomIdx(), b.GetEndAtomIdx(), b.GetBondTypeAsDouble()] for b in molecule.GetBonds()
        ] == bonds.tolist()


def test_water_has_known_properties():
    pytest.importorskip("rdkit")
    pytest.importorskip("tblite")
    from experiments.datasets.molecules import xtb

    water = xtb.compute("O")
    assert water.reason == ""
    targets = np.array(water.targets)
    assert targets[ZPVE] == pytest.approx(0.548, abs=1e-3)
    assert targets[MU] == pytest.approx(2.22, abs=0.01)
    positions = np.array(water.positions) / xtb.BOHR
    masses = masses_of(water.numbers)
    modes = frequencies(xtb.hessian(water.numbers, positions), positions, masses)
    motion = thermochemistry(modes, positions, masses)
    assert xtb.CALORIES * motion.entropy == pytest.approx(46.4, abs=0.05)
    assert targets[ZPVE] == pytest.approx(xtb.HARTREE * modes.sum() / 2, rel=1e-4)
    dipole = xtb.calculator(water.numbers, positions).singlepoint().get("dipole")
    along = dipole / np.linalg.norm(dipole)
    energies = [xtb.calculator(water.numbers, positions, f * along).singlepoint().get("energy") for f in (1e-3, -1e-3)]
    assert (energies[1] - energies[0]) / 2e-3 == pytest.approx(np.linalg.norm(dipole), rel=1e-3)  # fields are in atomic units


def test_free_atoms_are_those_of_gfn2():
    pytest.importorskip("rdkit")
    interface = pytest.importorskip("tblite.interface")
    from experiments.datasets.molecules.thermochemistry import MULTIPLICITIES
    from experiments.datasets.molecules.xtb import FREE_ATOMS

    for number, energy in FREE_ATOMS.items():
        atom = interface.Calculator("GFN2-xTB", np.array([number]), np.zeros((1, 3)), uhf=MULTIPLICITIES[number] - 1)
        atom.set("verbosity", 0)
        assert atom.singlepoint().get("energy") == pytest.approx(energy, abs=1e-7)


def test_what_cannot_be_a_minimum_is_said():
    pytest.importorskip("rdkit")
    pytest.importorskip("tblite")
    from experiments.datasets.molecules.xtb import compute

    assert compute("N=C=N").reason == "imaginary mode"
    assert compute("C1=C=CN=C=1").reason == "its bonds changed"


@pytest.mark.slow
def test_what_ships_is_what_the_script_makes(molecules, tmp_path, capsys):
    """A handful anew, in another process, and then from the checkpoint without computing."""
    pytest.importorskip("rdkit")
    pytest.importorskip("tblite")
    from experiments.datasets.molecules.make import compute_all, write

    rows = np.linspace(0, len(molecules.smiles) - 1, 6).astype(int)
    smiles = molecules.smiles[rows].tolist()
    checkpoint = tmp_path / "checkpoint.jsonl"
    first = compute_all(smiles[:3], checkpoint, 1)
    outcomes = compute_all(smiles, checkpoint, 1)
    assert outcomes[:3] == first
    assert "6 molecules, of which 3 are finished" in capsys.readouterr().out
    write(outcomes, tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as again:
        assert again["smiles"].tolist() == smiles
        np.testing.assert_allclose(again["targets"], molecules.targets[rows], rtol=1e-3, atol=2e-3)
        np.testing.assert_array_equal(again["atom_counts"], molecules.atom_counts[rows])
