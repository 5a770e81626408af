"""Runs of the tests, read back from MLflow."""

from mlflow import MlflowClient


def client(folder):
    return MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def the_run(folder):
    reader = client(folder)
    runs = reader.search_runs([reader.get_experiment_by_name("balance/problem").experiment_id])
    assert len(runs) == 1
    return runs[0]
