"""The message-passing network of the benchmark on QM9."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch_geometric.nn.aggr import Set2Set

from experiments.problems.base import Heads, Network, ScalarHead
from experiments.problems.quantum_chemistry.tasks import TASKS

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Batch

NODE_FEATURES = 11
EDGE_FEATURES = 5
ROUNDS = 3
READOUT_STEPS = 3


@dataclass
class ModelConfig:
    """Width of the network: 64 has the 617 675 parameters of the benchmark, 32 has 89 707 and suits a CPU."""

    dim: int = 64


def build_model(config: ModelConfig | None = None) -> Network:
    """A freshly initialised network for a `torch_geometric` batch of complete graphs.

    Raises:
        ValueError: If the width is not positive.
    """
    dim = (config or ModelConfig()).dim
    if dim < 1:
        raise ValueError(f"model.dim must be at least 1, but got {dim}.")
    return Network(MessagePassing(dim), Heads({task: ScalarHead(dim) for task in TASKS}))


class MessagePassing(nn.Module):
    """Atoms exchange messages with all others in three rounds; a readout makes one vector of them.

    Source:
        Gilmer et al., "Neural Message Passing for Quantum Chemistry", ICML 2017, with the sizes of the multi-task benchmark
        (Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022). All rounds have the same parameters.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(NODE_FEATURES, dim)
        self.convolution = EdgeConditionedConvolution(dim)
        self.update = nn.GRUCell(dim, dim)
        self.readout = Set2Set(dim, processing_steps=READOUT_STEPS)
        self.output = nn.Linear(2 * dim, dim)

    def forward(self, graphs: Batch) -> Tensor:
        """Representations of the molecules. Shape (B, dim)."""
        atoms = torch.relu(self.embedding(graphs.x))  # (N, dim)
        messages = self.convolution.prepare(graphs)
        for _ in range(ROUNDS):
            atoms = self.update(torch.relu(self.convolution(atoms, messages)), atoms)
        molecules = self.readout(atoms, graphs.batch, dim_size=graphs.num_graphs)
        return torch.relu(self.output(molecules))


class Messages(NamedTuple):
    """What does not change from round to round, with room for the same number S of atoms in every molecule of a batch."""

    places: Tensor  # of each atom among the B * S. Shape (N,)
    edges: Tensor  # h(e) and a 1, over the target's degree; zero where no edge is. Shape (B, S, S * (H + 1)): target, source
    matrix: Tensor  # the edge network's last layer. Shape (dim, (H + 1) * dim)


class EdgeConditionedConvolution(nn.Module):
    r"""Each edge turns the features of its source with a matrix of its own, made by a small network; the target takes the mean.

    .. math:: y_i = W x_i + b + \tfrac1{|N(i)|} \sum_{j \in N(i)} \Theta(e_{ij})^\top x_j,
        \quad \Theta(e) = \operatorname{reshape}(C\, h(e) + c), \quad h(e) = \operatorname{relu}(A e + a)

    The same function of the same parameters as ``torch_geometric.nn.NNConv`` with a two-layer edge network. Differs: as the
    matrices are linear in h, C is applied to the atoms, not to the edges. An edge then costs O(dim^2) instead of O(dim^3) and
    needs no matrix in memory, and h is computed once for all rounds. On a CPU that is 4 to 8 times as fast.

    Args:
        dim: Size of the features of an atom, before and after. The edge network has H = 2 dim hidden units.

    Source:
        Gilmer et al., "Neural Message Passing for Quantum Chemistry", ICML 2017, section 5.1; Simonovsky and Komodakis,
        "Dynamic Edge-Conditioned Filters in Convolutional Neural Networks on Graphs", CVPR 2017.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.edge_hidden = nn.Linear(EDGE_FEATURES, 2 * dim)
        self.edge_matrix = nn.Linear(2 * dim, dim * dim)
        self.root = nn.Linear(dim, dim)
        nn.init.zeros_(self.root.bias)

    def prepare(self, graphs: Batch) -> Messages:
        """What all rounds share. There must not be two edges from one atom to another."""
        ptr, owner = graphs.ptr, graphs.batch
        source, target = graphs.edge_index
        room = int((ptr[1:] - ptr[:-1]).max())
        within = torch.arange(len(owner), device=owner.device) - ptr[owner]
        places = owner * room + within
        hidden = torch.relu(self.edge_hidden(graphs.edge_attr))
        hidden = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)
        degrees = hidden.new_zeros(len(owner)).index_add(0, target, hidden[:, -1].detach())[target]
        edges = hidden.new_zeros(graphs.num_graphs * room * room, hidden.shape[1])
        edges = edges.index_copy(0, places[target] * room + within[source], hidden / degrees[:, None])
        matrix = torch.cat([self.edge_matrix.weight, self.edge_matrix.bias[:, None]], dim=1).view(self.dim, self.dim, -1)
        return Messages(places, edges.view(graphs.num_graphs, room, -1), matrix.mT.reshape(self.dim, -1))

    def forward(self, atoms: Tensor, messages: Messages) -> Tensor:
        """New features of the atoms. Shape (N, dim) -> (N, dim)."""
        places, edges, matrix = messages
        room = edges.shape[1]
        dense = atoms.new_zeros(len(edges) * room, self.dim).index_copy(0, places, atoms)
        received = edges @ (dense @ matrix).view(len(edges), -1, self.dim)  # (B, S, dim)
        updated: Tensor = self.root(atoms) + received.flatten(0, 1)[places]
        return updated
