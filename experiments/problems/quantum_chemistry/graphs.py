"""Complete molecular graphs as flat tensors, from which a batch is taken without a loop over its molecules."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import Dataset
from torch_geometric.data import Batch

ELEMENTS = (1, 6, 7, 8, 9)
BOND_TYPES = 4  # single, double, triple, aromatic
BOND_FEATURES = torch.eye(1 + BOND_TYPES).roll(-1, 1)  # row 0: no bond; one-hot type, then a column for the distance
BOND_FEATURES[0] = 0
CHUNK = 10_000  # molecules at a time: the 41 million edges of QM9 would take gigabytes at once


class Graphs(NamedTuple):
    """M molecules with N atoms in all, one after the other; n atoms have n (n - 1) edges, ordered by source, then target."""

    sizes: Tensor  # atoms of each molecule. Shape (M,)
    nodes: Tensor  # features. Shape (N, 11)
    bonds: Tensor  # of each edge: 0 for none, else 1 + its type. Shape (E,), uint8
    distances: Tensor  # of each edge, Angstrom. Shape (E,)
    targets: Tensor  # energies in eV. Shape (M, 11), float64


def complete(sizes: Tensor, nodes: Tensor, positions: Tensor, bonds: Tensor, bond_types: Tensor, targets: Tensor) -> Graphs:
    """Connect every atom with all others of its molecule.

    Args:
        sizes: Atoms of each molecule. Shape (M,).
        nodes: Features. Shape (N, 11).
        positions: Angstrom. Shape (N, 3).
        bonds: Both directions of each bond, atoms counted over all molecules. Shape (2, number of directed bonds).
        bond_types: 0 to 3. Shape (number of directed bonds,).
        targets: Shape (M, 11).

    Returns:
        The graphs.
    """
    first = exclusive_sum(sizes)
    starts = exclusive_sum(sizes * (sizes - 1))
    parts = zip(torch.split(first, CHUNK), torch.split(sizes, CHUNK), strict=True)
    distances = torch.cat([distances_within(positions, *part) for part in parts])
    molecule = torch.arange(len(sizes)).repeat_interleave(sizes)[bonds[0]]
    source, target = bonds - first[molecule]
    codes = torch.zeros(len(distances), dtype=torch.uint8)
    codes[starts[molecule] + source * (sizes[molecule] - 1) + target - (target > source).long()] = (1 + bond_types).byte()
    return Graphs(sizes, nodes, codes, distances, targets)


def distances_within(positions: Tensor, first: Tensor, sizes: Tensor) -> Tensor:
    """Return the length of each edge of the complete graphs on atoms ``first`` to ``first + sizes``. Shape (E,)."""
    owner, source, target = edges_of(sizes)
    lengths: Tensor = torch.linalg.vector_norm(positions[first[owner] + source] - positions[first[owner] + target], dim=1)
    return lengths


def node_features(sizes: Tensor, numbers: Tensor, bonds: Tensor) -> Tensor:
    """Compute the features that ``torch_geometric.datasets.QM9`` gives to unsanitised molecules.

    One-hot element (5), atomic number, aromatic, sp, sp2, sp3 (all zero), number of hydrogens bonded to it.

    Args:
        sizes: Atoms of each molecule. Shape (M,).
        numbers: Atomic numbers. Shape (N,).
        bonds: Both directions of each bond. Shape (2, number of directed bonds).

    Returns:
        Shape (N, 11).
    """
    hydrogens = torch.zeros(int(sizes.sum())).index_add(0, bonds[1], (numbers[bonds[0]] == 1).float())
    element = one_hot(torch.searchsorted(torch.tensor(ELEMENTS), numbers), len(ELEMENTS)).float()
    return torch.cat([element, numbers[:, None].float(), torch.zeros(len(numbers), 4), hydrogens[:, None]], dim=1)


class Standardised(Dataset[tuple[Batch, Tensor]]):
    """Some of the molecules; an item is a batch: the graphs, and their standardised targets (B, 11).

    The graphs have an attribute ``deviations`` (11,): the standard deviation of each target in its reported unit.

    Args:
        graphs: All molecules.
        members: Indices of the molecules in this data set. Shape (M',).
        mean: Mean of the targets. Shape (11,).
        deviations: Standard deviation of the targets. Shape (11,).
        units: One unit of a target in its reported unit. Shape (11,).
    """

    def __init__(self, graphs: Graphs, members: Tensor, mean: Tensor, deviations: Tensor, units: Tensor) -> None:
        self.graphs = graphs
        self.members = members
        self.standardised = ((graphs.targets - mean) / deviations).float()
        self.deviations = (deviations * units).float()
        self.first_node = exclusive_sum(graphs.sizes)
        self.first_edge = exclusive_sum(graphs.sizes * (graphs.sizes - 1))

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, indices: list[int]) -> tuple[Batch, Tensor]:
        """Return a batch of the molecules at these positions."""
        molecules = self.members[indices]
        sizes = self.graphs.sizes[molecules]
        owner, source, target = edges_of(sizes)
        nodes = ranges(self.first_node[molecules], sizes)
        edges = ranges(self.first_edge[molecules], sizes * (sizes - 1))
        ptr = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        attributes = BOND_FEATURES[self.graphs.bonds[edges].int()]
        attributes[:, BOND_TYPES] = self.graphs.distances[edges]
        batch = Batch(
            x=self.graphs.nodes[nodes],
            edge_index=torch.stack([source, target]) + ptr[owner],
            edge_attr=attributes,
            batch=torch.arange(len(sizes)).repeat_interleave(sizes),
            ptr=ptr,
            deviations=self.deviations,
        )
        return batch, self.standardised[molecules]


def exclusive_sum(counts: Tensor) -> Tensor:
    """Return the start of each run if runs of these lengths follow each other. Shape (M,) -> (M,)."""
    return counts.cumsum(0) - counts


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return ``starts[0], starts[0] + 1, ...`` for the first length, then from ``starts[1]`` for the second, and so on."""
    return torch.arange(int(lengths.sum())) + (starts - exclusive_sum(lengths)).repeat_interleave(lengths)


def edges_of(sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return molecule, source and target (counted within the molecule) of every edge of complete graphs of these sizes."""
    counts = sizes * (sizes - 1)
    owner = torch.arange(len(sizes)).repeat_interleave(counts)
    others = sizes[owner] - 1
    rank = ranges(torch.zeros_like(counts), counts)
    source = rank // others
    target = rank % others
    return owner, source, target + (target >= source).long()
