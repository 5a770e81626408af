"""Runs of the benchmarks, without a look at the times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("bench_rules.py", ["--repeats", "2", "--sizes", "3"]),
        ("bench_overhead.py", ["--budget", "0", "--tasks", "2", "--engine-tasks", "2"]),
        ("bench_step.py", ["--repeats", "2", "--networks", "mlp", "--tasks", "3"]),
        ("bench_per_sample.py", ["--repeats", "2", "--samples", "2", "4"]),
        ("bench_distributed.py", ["--turns", "2", "--tasks", "2"]),
        ("bench_llm.py", ["--repeats", "2", "--width", "8", "--layers", "1", "--length", "8", "--tasks", "2", "--batch", "1"]),
        ("bench_many_tasks.py", ["--budget", "0", "--tasks", "2", "3"]),
        ("bench_agent.py", ["--sizes", "default", "--source", "points", "--budget", "0"]),
        ("bench_threads.py", ["--seconds", "0", "--problems", "toy", "regression100"]),
        ("bench_jacobian.py", ["--budget", "0", "--networks", "mlp", "transformer", "--tasks", "2", "3"]),
    ],
)
def test_benchmark(script, options, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--output", str(tmp_path), *options]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    files = list(tmp_path.glob("*.json"))
    assert len(files) == (2 if script == "bench_overhead.py" else 1)
    for file in files:
        for rows in json.loads(file.read_text(encoding="utf-8"))["results"].values():
            assert all(row["ms"] > 0 for row in rows.values())
    assert len(list(tmp_path.glob("*.png"))) == (script in ("bench_jacobian.py", "bench_many_tasks.py"))


@pytest.mark.slow
def test_conflicts_after_the_step_of_the_optimizer(tmp_path):
    script, options = ROOT / "benchmarks/bench_optimizer_metric.py", ["--problems", "digits", "--methods", "mgda"]
    command = [sys.executable, str(script), *options, "--seeds", "0", "--steps", "24", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    (file,) = tmp_path.glob("*.json")
    (rows,) = json.loads(file.read_text(encoding="utf-8"))["results"].values()
    assert [(row["optimizer"], row["metric"]) for row in rows] == [
        (optimizer, metric) for optimizer in ("Adam", "Adam without momentum") for metric in ("gradients", "optimizer")
    ]
    assert rows[0]["direction"] == rows[2]["direction"] == 0.0  # mgda conflicts with no task in the metric that it sees
    assert all(0 <= row["step"] <= 1 for row in rows)


def test_noise_of_directions(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import direction_noise
    import torch

    half = 0.5**0.5
    assert direction_noise.agreement(torch.tensor([[1.0, 0], [1, 0], [1, 0]])) == pytest.approx(1)
    assert direction_noise.agreement(torch.tensor([[1.0, 0], [half, half]])) == pytest.approx(half)
    words = ["--experiment", "digits", "--epochs", "1", "--batches", "2", "--overrides", "data.train_pairs=128"]
    direction_noise.main([*words, "--rules", "none", "imtl", "mgda"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["rule", "---", "none", "imtl", "mgda"]
    assert all(-1 <= float(row[1]) <= 1 for row in rows[2:])
    assert rows[4][2] == "0.00"  # mgda has no negative weights


def test_rules_are_measured_against_their_own_certificates(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bench_rules

    for num_tasks in (3, 11):
        G = bench_rules.problem(num_tasks, 0)
        for name, rule in bench_rules.ours(num_tasks).items():
            error = bench_rules.accuracy(name, G, rule(G))
            assert error is None or error <= 1e-10
            if error is not None:  # a certificate that the mean would pass is none
                assert (
                    bench_rules.accuracy(name, G, G.new_full((num_tasks,), 1 / num_tasks) + 0.1 * G.diagonal() / G.trace())
                    > 1e-3
                )
