"""Molecules and their 11 properties: molecules that ship with the project, or QM9 from disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from balance.config import check_settings, setting
from experiments.datasets import molecules
from experiments.problems.base import PROTOCOLS, ProtocolName, Splits, check_source
from experiments.problems.quantum_chemistry import qm9
from experiments.problems.quantum_chemistry.graphs import Graphs, Standardised, complete, exclusive_sum, node_features
from experiments.problems.quantum_chemistry.tasks import TASKS

IN_MILLI = frozenset({"homo", "lumo", "zpve", "u0", "u", "h", "g"})  # given in eV, reported in meV
UNITS = torch.tensor([1000.0 if task in IN_MILLI else 1.0 for task in TASKS], dtype=torch.float64)
ON_DISK = "qm9"
HELD_OUT = {"molecules": 200, ON_DISK: 10_000}  # validation molecules, and test molecules, by source


@dataclass
class DataConfig:
    """Molecules, and their split.

    The protocol applies to the mean and the standard deviation that standardise targets. With ``sound`` they come from the
    training molecules, with ``paper`` from all molecules, as in the code of the benchmark. In that code the seed of the run
    also decides on the split, so that every run is tested on different molecules. Here the split has a separate seed.
    """

    source: str = setting("molecules", choices=tuple(HELD_OUT), help="molecules of the project or QM9; data.path implies qm9")
    path: str | None = setting(None, help="folder of QM9, with raw or processed in it")
    protocol: ProtocolName = setting("sound", choices=PROTOCOLS, help="standardisation: sound, or as in the published code")
    seed: int = setting(0, minimum=0, help="seed of the split")
    validation_molecules: int | None = setting(None, minimum=1, help="number for validation; null: 10 000 of QM9, else 200")
    test_molecules: int | None = setting(None, minimum=1, help="number for testing; null: 10 000 of QM9, else 200")


def load(config: DataConfig) -> Splits:
    """Return train, validation and test molecules; in a random order the test molecules come first, as in QM9's code.

    Args:
        config: Source and split of the molecules.

    Returns:
        Data sets of graphs and standardised targets.

    Raises:
        ValueError: If an option is out of range, a split would be empty, or a file is damaged.
    """
    check_settings(config, "data")
    check_source(config.source, config.path, ON_DISK, "raw/gdb9.sdf in it")
    graphs = shipped() if config.path is None else qm9.read(Path(config.path).expanduser())
    members = split(len(graphs.sizes), config)
    measured = graphs.targets if config.protocol == "paper" else graphs.targets[members[2]]
    mean, deviations = measured.mean(0), measured.std(0)
    for task, deviation in zip(TASKS, deviations.tolist(), strict=True):
        if not deviation > 0:
            raise ValueError(f"data: {task} cannot be standardised: all {len(members[2])} training molecules have one value.")
    parts = [Standardised(graphs, part, mean, deviations, UNITS) for part in members]
    return Splits(train=parts[2], validation=parts[1], test=parts[0])


def split(count: int, config: DataConfig) -> tuple[torch.Tensor, ...]:
    """Split molecules at random.

    Args:
        count: Number of molecules.
        config: Sizes and seed of the split.

    Returns:
        Indices of the test, validation and training molecules.

    Raises:
        ValueError: If too few molecules are left for training.
    """
    default = HELD_OUT[config.source]
    test = default if config.test_molecules is None else config.test_molecules
    validation = default if config.validation_molecules is None else config.validation_molecules
    train = count - test - validation
    if train < 2:
        raise ValueError(
            f"data: training must have at least two molecules, but of {count} molecules {train} are left for training after "
            f"{validation} for validation and {test} for testing. Set data.validation_molecules and data.test_molecules."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))
    return torch.split(order, [test, validation, train])


def shipped() -> Graphs:
    """Return the molecules that ship with the project, as complete graphs."""
    source = molecules.read()
    sizes, numbers, pairs = (torch.from_numpy(a).long() for a in (source.atom_counts, source.numbers, source.bonds[:, :2]))
    pairs = pairs + exclusive_sum(sizes).repeat_interleave(torch.from_numpy(source.bond_counts).long())[:, None]
    bonds = torch.cat([pairs, pairs.flip(1)]).T
    types = torch.from_numpy(source.bonds[:, 2]).long().repeat(2) - 1
    nodes = node_features(sizes, numbers, bonds)
    return complete(sizes, nodes, torch.from_numpy(source.positions), bonds, types, torch.from_numpy(source.targets))
