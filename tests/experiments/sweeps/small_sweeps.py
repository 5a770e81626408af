"""Words for a small sweep on digits, its recorded runs, its table, and sweeps in separate processes."""

import subprocess
import sys

from mlflow import MlflowClient

from experiments import compare
from tests.experiments.short_runs import ROOT

TINY = ["data.train_pairs=128", "data.validation_pairs=50", "data.test_pairs=50", "train.epochs=1", "log_model=false"]
GRID = ["--loss_method=ls,uw", "--gradient_method=none,pcgrad", "--seeds=2", "--jobs=1", *TINY]


def recorded(folder, condition=""):
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    return client.search_runs([client.get_experiment_by_name("balance/digits").experiment_id], condition), client


def markdown(folder, capfd, *words):
    capfd.readouterr()
    assert compare.main([f"--output_dir={folder}", "--table_only", "--format=markdown", *words]) == 0
    return capfd.readouterr().out


def without_costs(table):
    """Rows by method, without the two columns that are measured in time and memory."""
    rows = [line.split("|")[1:-3] for line in table.splitlines() if line.startswith("|")]
    return {row[0].strip(): row[1:] for row in rows}


def start(folder, *words, **options):
    command = [sys.executable, str(ROOT / "experiments/sweep.py"), *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
