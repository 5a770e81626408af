"""Eleven properties of small organic molecules, from their structures: the benchmark on QM9.

By default the molecules ship with the project, and their properties come from a cheaper theory. Never compare such results with
results on QM9, which `data.path=FOLDER` reads.

    mu, alpha, homo, lumo, r2, zpve, u0, u, h, g, cv
        squared error of the standardised target; mean absolute error in D, a0^3, meV, meV, a0^2, 5 x meV, cal / mol K
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("torch_geometric") is None:
    raise ModuleNotFoundError("The experiment 'quantum_chemistry' needs torch_geometric: pip install -e . --group graph.")

from experiments.problems.quantum_chemistry.data import ON_DISK, DataConfig, load
from experiments.problems.quantum_chemistry.model import ModelConfig, build_model
from experiments.problems.quantum_chemistry.tasks import HIGHER_IS_BETTER, TASKS, losses, metrics, targets

__all__ = [
    "HIGHER_IS_BETTER",
    "ON_DISK",
    "TASKS",
    "DataConfig",
    "ModelConfig",
    "build_model",
    "load",
    "losses",
    "metrics",
    "targets",
]
