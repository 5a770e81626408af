"""A new problem is one folder and a line in the changelog, and nothing else.

The folder is added to a copy of the project, whose commands and tests then run in other processes.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDER = {
    "__init__.py": '''
"""Four random bits, two tasks of different kinds."""

from experiments.problems.bits.data import DataConfig, load
from experiments.problems.bits.model import build_model
from experiments.problems.bits.tasks import HIGHER_IS_BETTER, TASKS, losses, metrics, targets

__all__ = ["HIGHER_IS_BETTER", "TASKS", "DataConfig", "build_model", "load", "losses", "metrics", "targets"]
''',
    "data.py": """
from dataclasses import dataclass

import torch
from torch.utils.data import TensorDataset

from balance.config import check_settings, setting
from experiments.problems.base import Splits


@dataclass
class DataConfig:
    seed: int = setting(0, minimum=0, help="seed of the bits")
    samples: int = setting(64, minimum=1, help="samples of each split")


def load(config):
    check_settings(config, "data")
    generator = torch.Generator().manual_seed(config.seed)
    bits = torch.randint(2, (3, config.samples, 4), generator=generator).float()
    return Splits(*(TensorDataset(split, split.sum(1) % 2, split.sum(1)) for split in bits))
""",
    "model.py": """
from torch import nn

from experiments.problems.base import Heads, Network, ScalarHead
from experiments.problems.bits.tasks import TASKS


def build_model():
    return Network(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), Heads({task: ScalarHead(8) for task in TASKS}))
""",
    "tasks.py": """
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import BinaryAccuracy

TASKS = ("parity", "count")
HIGHER_IS_BETTER = frozenset({"parity/accuracy"})


def targets(batch):
    return {"parity": batch[1], "count": batch[2]}


def losses(outputs, batch):
    expected = targets(batch)
    return {
        "parity": binary_cross_entropy_with_logits(outputs["parity"], expected["parity"]),
        "count": mse_loss(outputs["count"], expected["count"]),
    }


def metrics():
    return {"parity/accuracy": BinaryAccuracy(), "count/mae": MeanAbsoluteError()}
""",
    "config.yaml": "train: {epochs: 2, batch_size: 32, lr: 0.01}\n",
}
COMMANDS = """
import sys

from experiments import compare, sweep, trainer

problem = ["--experiment=bits", "--output_dir=runs"]
assert trainer.main([*problem, "--loss_method=uw", "--gradient_method=pcgrad", "log_model=false", "data.samples=40"]) == 0
assert sweep.main([*problem, "--loss_method=ls,famo", "--gradient_method=none,cagrad", "--seeds=2", "--dry_run"]) == 0
assert compare.main([*problem, "--baselines=none", "--table_only"]) == 0
try:
    trainer.main([*problem, "data.samples=0"])
except SystemExit as refused:
    assert refused.code == 2
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the project with a further problem, without its line in the changelog."""
    for package in ("balance", "experiments", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    folder = tmp_path / "experiments" / "problems" / "bits"
    folder.mkdir()
    for name, text in FOLDER.items():
        (folder / name).write_text(text.lstrip("\n"), encoding="utf-8")
    return tmp_path


def python(copy, *words):
    """Run a command on the copy, and return its exit code and its output."""
    environment = os.environ | {"PYTHONPATH": str(copy), "COLUMNS": "200"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_folder_is_all_that_the_commands_need(copy):
    code, printed = python(copy, "-c", COMMANDS)
    assert code == 0, printed
    for expected in ("bits: uw + pcgrad", "parity", "count", "12 runs", "data.samples must be at least 1, but got 0"):
        assert expected in printed


@pytest.mark.slow
def test_demands_of_problems_are_a_folder_and_a_line_in_the_changelog(copy):
    demands = [
        "-m",
        "pytest",
        "-q",
        "-k",
        "bits or summaries",
        *map(str, copy.glob("tests/experiments/problems/test_[be]*.py")),
    ]
    code, printed = python(copy, *demands)
    assert code == 1
    failed = re.findall(r"^FAILED \S+::(\S+)", printed, flags=re.MULTILINE)
    assert failed == ["test_problem_has_a_line_in_the_changelog[bits]"], printed
    with (copy / "CHANGELOG.md").open("a", encoding="utf-8") as changelog:
        changelog.write("\n- Problem `bits`.\n")
    code, printed = python(copy, *demands)
    assert code == 0, printed
