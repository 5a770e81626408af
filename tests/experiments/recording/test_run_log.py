import json

import numpy as np
import pytest
import torch
from rich.console import Console

from balance import Report
from experiments.recording.run_log import step_metrics
from experiments.training import loop
from tests.experiments.short_runs import BOTH, DIGITS, prepare, run_in, runs_in, train


def test_many_tasks_are_logged_in_short():
    def report(gradients):
        numbers = torch.ones(len(gradients))
        tasks = tuple(f"t{k}" for k in range(len(gradients)))
        return Report(tasks, numbers, numbers, numbers, numbers, gradients @ gradients.T)

    gradients = torch.randn(13, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    short, whole = step_metrics(report(gradients)), report(gradients).as_metrics()
    cosines = [value for name, value in whole.items() if name.startswith("cosine/")]
    assert len(cosines) == 78
    assert short["cosine/mean"] == pytest.approx(np.mean(cosines))
    assert short["cosine/min"] == pytest.approx(min(cosines))
    assert short["conflicts"] == whole["conflicts"] > 0
    assert set(short) == {name for name in whole if not name.startswith("cosine/")} | {"cosine/mean", "cosine/min"}
    assert step_metrics(report(gradients[:12])) == report(gradients[:12]).as_metrics()


def test_forty_tasks_recorded(tiny, tmp_path, capfd):
    run = prepare(*tiny("celeba", *BOTH, "track=true", "log_every=1", "log_model=false"), console=Console(width=120))
    loop.train(run)
    printed = capfd.readouterr().out
    assert len(printed.splitlines()) < 15
    assert "No delta_m" in printed
    recorded, _ = run_in(tmp_path, "celeba")
    names = set(recorded.data.metrics)
    assert {"cosine/mean", "cosine/min", "conflicts", "cost/waiting", "loss/bald", "weight/young", "final/bald/f1"} <= names
    assert sum(name.startswith("cosine/") for name in names) == 2
    assert "final/delta_m" not in names
    assert 0 < recorded.data.metrics["cost/waiting"] < 1


def test_the_run_in_mlflow(demo):
    folder, _ = demo
    (run,), client = runs_in(folder / "runs")
    assert run.info.status == "FINISHED"
    assert {"loss_method": "go4align", "gradient_method": "pcgrad", "seed": "4"}.items() <= run.data.tags.items()
    assert {"train.epochs": "2", "loss.num_groups": "3", "balancer.source": "parameters"}.items() <= run.data.params.items()
    tasks = ("left", "right", "sum", "reconstruction")
    names = {f"{group}/{task}" for group in ("loss", "weight", "gradient_weight") for task in tasks}
    names |= {f"cosine/{a}__{b}" for i, a in enumerate(tasks) for b in tasks[i + 1 :]}
    measured = {"left/accuracy", "right/accuracy", "sum/mae", "reconstruction/rmse"}
    names |= {f"{group}/{name}" for group in ("val", "final") for name in measured} | {"final/delta_m"}
    assert names <= set(run.data.metrics)
    assert len(client.get_metric_history(run.info.run_id, "val/sum/mae")) == 2
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["checkpoints", "config.yaml"]
    checkpoints = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "checkpoints")]
    assert checkpoints == ["checkpoints/best.pt", "checkpoints/last.pt"]
    assert run.data.tags["kind"] == "run"
    assert run.data.metrics["cost/step_ms"] > 0
    assert run.data.metrics["cost/run_s"] > 0
    # the gradients of four tasks on 23 296 parameters, and less than a hundred times as much in all
    assert 4 * 23_296 * 4 / 2**20 < run.data.metrics["cost/step_mib"] < 40
    data = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
    assert {context: json.loads(used.profile)["num_rows"] for context, used in data.items()} == {
        "training": 256,
        "validation": 100,
        "testing": 100,
    }
    assert len({used.digest for used in data.values()}) == 3


def test_system_metrics_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.02")
    train(
        "--loss_method=ls", *DIGITS[:3], "train.epochs=10", "system_metrics=true", "log_model=false", f"output_dir={tmp_path}"
    )
    (run,), client = runs_in(tmp_path)
    assert any(name.startswith("system/cpu") for name in run.data.metrics)
    assert client.search_logged_models([run.info.experiment_id]) == []
