"""All small molecules of carbon, nitrogen, oxygen and fluorine, up to a number of heavy atoms, that pass four filters."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from rdkit import Chem

VALENCES = {6: 4, 7: 3, 8: 2, 9: 1}
ORDERS = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}
UNWANTED = tuple(
    Chem.MolFromSmarts(pattern)
    for pattern in (
        "[#7,#8,#9]-[#7,#8,#9]",  # weak bonds, as in peroxides
        "[r3,r4]=,#[r3,r4]",  # strain that GFN2-xTB, and the force field before it, often break
        "*#;@*",
    )
)


class Graph(NamedTuple):
    """Heavy atoms and the bonds between them; hydrogens fill the free valences."""

    atoms: tuple[int, ...]  # atomic numbers
    bonds: tuple[tuple[int, int, int], ...]  # atom, atom, order


def enumerate_smiles(least: int = 2, most: int = 5) -> list[str]:
    """Return SMILES of all neutral, valence-correct, connected molecules with ``least`` to ``most`` heavy atoms.

    An atom is added to every smaller molecule in every way. That yields each graph, since each has an atom whose removal
    leaves it connected. Left out are single bonds between N, O and F, triple bonds in rings, and multiple bonds in rings of
    three and four atoms. So are molecules with more than one ring.

    Args:
        least: Heavy atoms of the smallest molecules.
        most: Heavy atoms of the largest molecules.

    Returns:
        Canonical SMILES, fewest heavy atoms first, alphabetical among equals. Counts for 2 to 5: 13, 44, 215, 1212.
    """
    graphs = {smiles_of(graph): graph for graph in (Graph((atom,), ()) for atom in VALENCES)}
    selected: list[str] = []
    for size in range(1, most + 1):
        if size > 1:
            graphs = {smiles_of(larger): larger for graph in graphs.values() for larger in extensions(graph)}
        if size >= least:
            selected += sorted(smiles for smiles, graph in graphs.items() if wanted(graph))
    return selected


def extensions(graph: Graph) -> list[Graph]:
    """Return all graphs with one atom more."""
    free = [VALENCES[atom] for atom in graph.atoms]
    for first, second, order in graph.bonds:
        free[first] -= order
        free[second] -= order
    larger = []
    for atom, valence in VALENCES.items():
        for orders in product(*(range(min(3, valence, rest) + 1) for rest in free)):
            if 0 < sum(orders) <= valence:
                new = tuple((index, len(graph.atoms), order) for index, order in enumerate(orders) if order)
                larger.append(Graph((*graph.atoms, atom), graph.bonds + new))
    return larger


def molecule(graph: Graph) -> Chem.Mol:
    """Return the RDKit molecule of a graph, with the bond orders as they are given, not aromatic."""
    editable = Chem.RWMol()
    for atom in graph.atoms:
        editable.AddAtom(Chem.Atom(atom))
    for first, second, order in graph.bonds:
        editable.AddBond(first, second, ORDERS[order])
    Chem.SanitizeMol(editable, Chem.SANITIZE_ALL ^ Chem.SANITIZE_SETAROMATICITY)
    return editable.GetMol()


def smiles_of(graph: Graph) -> str:
    """Return canonical SMILES, which do not depend on the notation of the bonds of an aromatic ring."""
    aromatic = molecule(graph)
    Chem.SanitizeMol(aromatic)
    return str(Chem.MolToSmiles(aromatic))


def wanted(graph: Graph) -> bool:
    """Return whether a graph passes all four filters."""
    candidate = molecule(graph)
    rings = len(graph.bonds) - len(graph.atoms) + 1
    return rings <= 1 and not any(candidate.HasSubstructMatch(pattern) for pattern in UNWANTED)
