import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from rich.console import Console

from experiments.training import loop
from tests.experiments.short_runs import BOTH, prepare, run_in, runs_in


@pytest.mark.filterwarnings("ignore::UserWarning:mlflow")
def test_mlflow_loads_a_network_on_graphs(tiny, tmp_path, capfd):
    run = prepare(*tiny("quantum_chemistry", *BOTH, "track=true"), console=Console(width=200))
    loop.train(run)
    assert "MLflow serves arrays, not graphs" in capfd.readouterr().out
    recorded, client = run_in(tmp_path, "quantum_chemistry")
    assert [artifact.path for artifact in client.list_artifacts(recorded.info.run_id, "checkpoints")] == [
        "checkpoints/best.pt",
        "checkpoints/last.pt",
    ]
    assert len({used.dataset.digest for used in recorded.inputs.dataset_inputs}) == 3
    (logged,) = client.search_logged_models([recorded.info.experiment_id])
    import mlflow.pytorch

    network = mlflow.pytorch.load_model(logged.artifact_location)
    graphs = run.data.test[[0, 1, 2]][0]
    with torch.no_grad():
        for task, answer in network(graphs).items():
            assert torch.equal(answer, run.model(graphs)[task])


@pytest.mark.slow
def test_mlflow_loads_and_serves_the_tested_network(demo, monkeypatch):
    """`mlflow.pytorch.load_model` from a run, with the weights of the best epoch and without the project on the path."""
    import mlflow

    folder, _ = demo
    (run,), client = runs_in(folder / "runs")
    (logged,) = client.search_logged_models([run.info.experiment_id])
    assert logged.source_run_id == run.info.run_id
    (file,) = (folder / "runs" / "digits").glob("*/best.pt")
    best = torch.load(file)["model"]
    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
        mlflow.set_tracking_uri(None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about MLflow's type hints
            import mlflow.pytorch

            network = mlflow.pytorch.load_model(f"runs:/{run.info.run_id}/model")
            served = mlflow.pyfunc.load_model(logged.model_uri)
    assert all(torch.equal(tensor, best[name]) for name, tensor in network.state_dict().items())
    inputs = torch.rand(3, 1, 12, 12)
    answers = served.predict(inputs.numpy())
    assert {task: answer.shape for task, answer in answers.items()} == {
        "left": (3, 10),
        "right": (3, 10),
        "sum": (3, 1),
        "reconstruction": (3, 64),
    }
    assert torch.equal(torch.from_numpy(answers["sum"]), network(inputs)["sum"].detach())


@pytest.mark.slow
def test_mlflow_models_predict(demo, tmp_path):
    folder, _ = demo
    (run,), client = runs_in(folder / "runs")
    (tmp_path / "inputs.json").write_text(json.dumps({"inputs": torch.rand(2, 1, 12, 12).tolist()}), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "predict",
        "-m",
        f"runs:/{run.info.run_id}/model",
        "--env-manager",
        "local",
    ]
    command += ["-t", "json", "-i", str(tmp_path / "inputs.json")]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": client.tracking_uri}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    answers = json.loads(done.stdout)["predictions"]
    assert [len(row) for row in answers["reconstruction"]] == [64, 64]
