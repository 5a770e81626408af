"""The message-passing network of the benchmark on QM9."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch_geometric.nn.aggr import Set2Set

from balance.config import check_settings, setting
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
    """The network: 617 675 parameters as in the benchmark, or 89 707 with a width of 32, which suits a CPU."""

    dim: int = setting(64, minimum=1, help="width of the network")


def build_model(config: ModelConfig | None = None) -> Network:
    """Return a freshly initialised network: a `torch_geometric` batch of complete graphs to numbers (B,) by task.

    Args:
        config: Width of the network.

    Returns:
        The network.
    """
    config = config or ModelConfig()
    check_settings(config, "model")
    return Network(MessagePassing(config.dim), Heads({task: ScalarHead(config.dim) for task in TASKS}))


class MessagePassing(nn.Module):
    """Message passing between all atoms in three rounds, and a readout of one vector per molecule.

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
        """Return representations of the molecules. Shape (B, dim)."""
        atoms = torch.relu(self.embedding(graphs.x))  # (N, dim)
        messages = self.convolution.prepare(graphs)
        for _ in range(ROUNDS):
            atoms = self.update(torch.relu(self.convolution(atoms, messages)), atoms)
        molecules = self.readout(atoms, graphs.batch, dim_size=graphs.num_graphs)
        return torch.relu(self.output(molecules))


class Messages(NamedTuple):
    """The part of the convolution that all rounds share, with S places for atoms in every molecule of a batch."""

    places: Tensor  # of each atom among the B * S. Shape (N,)
    edges: Tensor  # h(e) and a 1, over the target's degree; zero without an edge. Shape (B, S, S * (H + 1)): target, source
    matrix: Tensor  # last layer of the edge network. Shape (dim, (H + 1) * dim)


class EdgeConditionedConvolution(nn.Module):
    r"""A convolution: each edge multiplies the features of its source by a matrix, and the target takes the mean.

    A small network computes the matrix of an edge from its features:

    .. math:: y_i = W x_i + b + \tfrac1{|N(i)|} \sum_{j \in N(i)} \Theta(e_{ij})^\top x_j,
        \quad \Theta(e) = \operatorname{reshape}(C\, h(e) + c), \quad h(e) = \operatorname{relu}(A e + a)

    It computes the function of ``torch_geometric.nn.NNConv`` with a two-layer edge network, from equal parameters. Differs: as
    the matrices are linear in h, C is applied to the atoms, not to the edges. An edge then costs O(dim^2) instead of O(dim^3)
    and needs no matrix in memory, and h is computed once for all rounds. On a CPU that is 4 to 8 times as fast.

    Args:
        dim: Number of features of an atom, in the input and in the output. The edge network has H = 2 dim hidden units.

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
        """Compute the part that all rounds share. Two edges from one atom to another are not allowed."""
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
        """Return new features of the atoms. Shape (N, dim) -> (N, dim)."""
        places, edges, matrix = messages
        room = edges.shape[1]
        dense = atoms.new_zeros(len(edges) * room, self.dim).index_copy(0, places, atoms)
        received = edges @ (dense @ matrix).view(len(edges), -1, self.dim)  # (B, S, dim)
        updated: Tensor = self.root(atoms) + received.flatten(0, 1)[places]
        return updated
