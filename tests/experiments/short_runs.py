"""Words for short runs of the trainer, and what such runs leave behind."""

import math
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from experiments import trainer
from experiments.config import layers
from experiments.training import loop, run

ROOT = Path(__file__).parents[2]
BOTH = ["--loss_method=famo", "--gradient_method=cagrad"]
DENSE = ["data.num_train=4", "data.num_validation=2", "data.num_test=2", "data.height=32", "data.width=48", "data.augment=true"]
LLM = ["model.width=8", "model.layers=1", "model.attention_heads=1", "model.rank=2", "model.pretraining_steps=2"]
TINY = {  # two steps, or a little more, in an epoch
    "burgers": [
        *("data.interior_points=20", "data.boundary_points=6", "data.initial_points=6", "model.depth=1"),
        *("train.batch_size=16", "train.lbfgs_steps=0"),
    ],
    "digits": ["data.train_pairs=128", "data.validation_pairs=50", "data.test_pairs=50"],
    "toy": ["data.steps=2"],
    "multimnist": ["train.batch_size=5385", "model.width=2"],
    "regression100": ["train.batch_size=500"],
    "nyuv2": [*DENSE, "train.batch_size=2"],
    "cityscapes": [*DENSE, "train.batch_size=2"],
    "quantum_chemistry": ["data.validation_molecules=20", "data.test_molecules=1290", "train.batch_size=8", "model.dim=4"],
    "celeba": ["data.train_images=16", "data.validation_images=8", "data.test_images=8", "train.batch_size=8"],
    "llm": [
        *LLM,
        "data.files=12",
        "data.train_samples=4",
        "data.validation_samples=4",
        "data.test_samples=4",
        "train.batch_size=2",
    ],
    "metaworld": [
        *("data.source=points", "data.tasks=east,north", "data.processes=false", "data.episode_steps=5"),
        *("agent.epoch_steps=2", "agent.random_steps=4", "train.batch_size=8", "train.report_last=1", "model.width=4"),
    ],
}
NAMES = tuple(TINY)
ON_DISK = {
    "nyuv2": ["train.batch_size=2", "model.name=small"],
    "cityscapes": ["train.batch_size=2", "model.name=small"],
    "celeba": ["train.batch_size=8", "model.name=small"],
    "multimnist": ["train.batch_size=25"],
    "quantum_chemistry": ["data.validation_molecules=1", "data.test_molecules=1", "train.batch_size=2", "model.dim=4"],
    "llm": [*LLM, "train.batch_size=13"],
}
DIGITS = ["data.train_pairs=256", "data.validation_pairs=100", "data.test_pairs=100", "train.epochs=2"]


def configure(*words):
    """Return the configuration that a command line describes; flags are overrides with two dashes."""
    return layers.configure([word.removeprefix("--") for word in words])


def prepare(*words, console=None):
    return run.prepare(configure(*words), console or Console(quiet=True))


def train(*words):
    return loop.train(prepare(*words))


def finite_metrics(final):
    assert all(math.isfinite(value) for value in final.values())
    return {name for name in final if "/" in name}


def runs_in(folder):
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    return client.search_runs([client.get_experiment_by_name("balance/digits").experiment_id]), client


def run_in(folder, name):
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    (recorded,) = client.search_runs([client.get_experiment_by_name(f"balance/{name}").experiment_id])
    assert recorded.info.status == "FINISHED"
    return recorded, client


def refused(words, capsys, tmp_path):
    """The message of a command that is refused, and leaves nothing behind."""
    with pytest.raises(SystemExit) as caught:
        trainer.main(words)
    assert caught.value.code == 2
    assert not (tmp_path / "runs").exists()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error
