"""Molecules and their 11 properties: those that ship with the project, or QM9 from disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from experiments.datasets import molecules
from experiments.problems.base import Splits, check_source
from experiments.problems.quantum_chemistry import qm9
from experiments.problems.quantum_chemistry.graphs import Graphs, Standardised, complete, exclusive_sum, node_features
from experiments.problems.quantum_chemistry.tasks import TASKS

IN_MILLI = frozenset({"homo", "lumo", "zpve", "u0", "u", "h", "g"})  # given in eV, reported in meV
UNITS = torch.tensor([1000.0 if task in IN_MILLI else 1.0 for task in TASKS], dtype=torch.float64)
ON_DISK = "qm9"
HELD_OUT = {"molecules": 200, "qm9": 10_000}


@dataclass
class DataConfig:
    """Which molecules; the seed and the sizes of the split.

    ``source: molecules`` are those that ship with the project; ``source: qm9``, which ``path`` implies on the command line, is
    QM9 from that folder. Validation and test molecules are 10 000 each of QM9, 200 each of the others, unless said otherwise.

    The protocol is about the mean and the standard deviation with which targets are standardised: "sound" takes them from
    the training molecules, "paper" from all, test molecules included, as the code of the benchmark does. That code also
    draws the split from the seed of the run, so that runs with different seeds are tested on different molecules; here
    ``seed`` is of its own.
    """

    source: str = "molecules"
    path: str | None = None
    protocol: Literal["sound", "paper"] = "sound"
    seed: int = 0
    validation_molecules: int | None = None
    test_molecules: int | None = None


def load(config: DataConfig) -> Splits:
    """Train, validation and test molecules: the test molecules come first in a random order, then validation, as in QM9's code.

    Raises:
        ValueError: If an option is not one of those above, or a split would be empty, or a file is damaged.
        FileNotFoundError: If a file is missing.
    """
    source = source_of(config)
    graphs = shipped() if source == "molecules" else qm9.read(Path(str(config.path)).expanduser())
    count = len(graphs.sizes)
    test = HELD_OUT[source] if config.test_molecules is None else config.test_molecules
    validation = HELD_OUT[source] if config.validation_molecules is None else config.validation_molecules
    sizes = [test, validation, count - test - validation]
    if min(test, validation) < 1 or sizes[2] < 2:
        raise ValueError(
            f"data: every split must have a molecule, and training two, but {count} molecules make {sizes[2]} for training, "
            f"{validation} for validation, {test} for testing. Set data.validation_molecules and data.test_molecules."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))
    members = torch.split(order, sizes)
    known = graphs.targets if config.protocol == "paper" else graphs.targets[members[2]]
    mean, deviations = known.mean(0), known.std(0)
    for task, deviation in zip(TASKS, deviations.tolist(), strict=True):
        if not deviation > 0:
            raise ValueError(f"data: {task} cannot be standardised, it is the same for all {sizes[2]} training molecules.")
    parts = [Standardised(graphs, part, mean, deviations, UNITS) for part in members]
    return Splits(train=parts[2], validation=parts[1], test=parts[0])


def source_of(config: DataConfig) -> str:
    """Name of the data set that is asked for.

    Raises:
        ValueError: If there is no such data set, or it needs a path.
    """
    if config.source not in HELD_OUT:
        raise ValueError(f"data.source must be one of {', '.join(HELD_OUT)}, but got {config.source!r}.")
    if config.protocol not in ("sound", "paper"):
        raise ValueError(f"data.protocol must be sound or paper, but got {config.protocol!r}.")
    check_source(config.source, config.path, ON_DISK, "raw/gdb9.sdf in it")
    return config.source


def shipped() -> Graphs:
    """The molecules that ship with the project, as complete graphs."""
    found = molecules.read()
    sizes, numbers, pairs = (torch.from_numpy(a).long() for a in (found.atom_counts, found.numbers, found.bonds[:, :2]))
    pairs = pairs + exclusive_sum(sizes).repeat_interleave(torch.from_numpy(found.bond_counts).long())[:, None]
    bonds = torch.cat([pairs, pairs.flip(1)]).T
    types = torch.from_numpy(found.bonds[:, 2]).long().repeat(2) - 1
    nodes = node_features(sizes, numbers, bonds)
    return complete(sizes, nodes, torch.from_numpy(found.positions), bonds, types, torch.from_numpy(found.targets))
