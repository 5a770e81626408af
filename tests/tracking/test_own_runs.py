"""Descriptions of runs that a user's own training loop records, and their final metrics."""

import json
import math

import pytest
import torch

import balance
from balance.tracking import Tracker
from tests.tracking.reading import client, the_run

METRICS = {"digit/accuracy": 0.9, "depth/rmse": 1.0}


def start(folder, **changes):
    arguments = {"balancer": balance.Balancer(("digit", "depth")), "seed": 3, "higher_is_better": ("digit/accuracy",)}
    return Tracker("problem", folder, **(arguments | changes))


def test_methods_and_options_are_recorded(folder):
    balancer = balance.Balancer(("a", "b"), "dwa", "cagrad", gradient_options={"c": 0.9}, scale="sum", weights={"a": 2.0})
    declared = {"higher_is_better": ["a/x"], "baselines": {"a/x": 0.5, "b/y": 2}}
    with start(folder, balancer=balancer, params={"lr": 0.1}, **declared) as tracker:
        tracker.log_metrics({"loss/a": 1.0}, 7)
        tracker.log_final({"a/x": torch.tensor(0.25), "b/y": 1})
    run = the_run(folder)
    params = {"loss_method": "dwa", "gradient_method": "cagrad", "seed": "3", "lr": "0.1", "gradient.c": "0.9"}
    assert run.data.params.items() >= (params | {"balancer.scale": "sum", "balancer.weights": "[2.0, 1.0]"}).items()
    assert any(key.startswith("loss.") for key in run.data.params)  # defaults of dwa
    tags = {"loss_method": "dwa", "gradient_method": "cagrad", "seed": "3", "kind": "run"}
    assert run.data.tags.items() >= tags.items()
    assert json.loads(run.data.tags["higher_is_better"]) == ["a/x"]
    assert json.loads(run.data.tags["baselines"]) == {"a/x": 0.5, "b/y": 2.0}
    assert run.info.run_name == "dwa + cagrad, seed 3"
    (point,) = client(folder).get_metric_history(run.info.run_id, "final/a/x")
    assert (point.value, point.step) == (0.25, 7)


def test_records_outside_of_the_run_are_refused(tmp_path):
    tracker = start(tmp_path)
    with pytest.raises(RuntimeError, match="inside of `with Tracker"):
        tracker.log_metrics({"loss/a": 1.0}, 0)
    with pytest.raises(RuntimeError, match="has not started or has ended"):
        tracker.log_final(METRICS)


def test_infinite_final_metrics_become_nan(folder):
    with start(folder) as tracker:
        tracker.log_final(METRICS | {"depth/rmse": math.inf})
    assert math.isnan(the_run(folder).data.metrics["final/depth/rmse"])


def test_single_task_runs_declare_their_task(folder):
    stl = balance.Balancer(("digit", "depth"), "stl", loss_options={"main_task": 1})
    assert start(folder, balancer=stl).tags["single_task"] == "depth"
    with start(folder, balancer=None, loss_method="stl") as tracker:
        with pytest.raises(ValueError, match="must be of one task, but got depth, digit"):
            tracker.log_final(METRICS)
        tracker.log_final({"digit/accuracy": 0.9})
    assert the_run(folder).data.tags.items() >= {"single_task": "digit", "kind": "baseline"}.items()


def test_a_resumed_run_keeps_its_description_and_takes_final_metrics(folder):
    with pytest.raises(KeyboardInterrupt), start(folder) as tracker:
        tracker.log_metrics({"loss/a": 1.0}, 0)
        raise KeyboardInterrupt
    with start(folder, run_id=tracker.run_id) as again:
        again.skip_written()
        again.log_metrics({"loss/a": 5.0}, 0)
        again.log_metrics({"loss/a": 2.0}, 1)
        again.log_final(METRICS)
    run = the_run(folder)
    history = client(folder).get_metric_history(run.info.run_id, "loss/a")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 2.0)]
    assert (run.info.status, run.data.metrics["final/depth/rmse"]) == ("FINISHED", 1.0)
    with Tracker("problem", folder, run_id=tracker.run_id) as bare:  # everything is read from the record
        bare.log_final(METRICS, 2)


def test_a_run_is_not_resumed_with_other_methods_or_elsewhere(folder):
    with start(folder) as tracker:
        pass
    other = start(folder, balancer=balance.Balancer(("digit", "depth"), "uw"), run_id=tracker.run_id)
    with pytest.raises(ValueError, match="has loss_method=ls, but got uw"):
        other.__enter__()
    with pytest.raises(ValueError, match="No run '0123' of 'balance/problem'"):
        start(folder, run_id="0123").__enter__()
    with pytest.raises(ValueError, match=f"No run '{tracker.run_id}' of 'balance/another'"):
        Tracker("another", folder, run_id=tracker.run_id).__enter__()
    assert the_run(folder).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seed": None}, ValueError, "must have a seed"),
        ({"seed": "3"}, TypeError, "seed must be an integer"),
        ({"loss_method": "uw"}, ValueError, "either them or balancer="),
        ({"balancer": torch.nn.Linear(1, 1)}, TypeError, "balancer must be a Balancer, but got Linear"),
        ({"params": {"seed": 4}}, ValueError, "params must not repeat seed"),
        ({"higher_is_better": "digit/accuracy"}, TypeError, "must be a sequence of names"),
        ({"higher_is_better": ("accuracy",)}, ValueError, "must be <task>/<metric>.*got 'accuracy'"),
        ({"baselines": {"digit/accuracy": 0.0}}, ValueError, "'digit/accuracy' must be a finite number other than zero"),
        ({"baselines": {"digit/accuracy": "high"}}, TypeError, "'digit/accuracy' must be a number"),
        ({"baselines": {"digit": 1.0}}, ValueError, "Names in baselines must be <task>/<metric>"),
        ({"higher_is_better": [f"task{k}/accuracy" for k in range(500)]}, ValueError, "at most 8000 characters"),
    ],
)
def test_mistakes_in_a_description(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        start(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "metrics", "error", "message"),
    [
        ({}, {}, ValueError, "at least one"),
        ({}, {"accuracy": 1.0}, ValueError, "Names in the final metrics must be <task>/<metric>"),
        ({}, {"final/digit/accuracy": 1.0}, ValueError, "must be <task>/<metric>"),
        ({}, METRICS | {"depth/rmse": "low"}, TypeError, "'depth/rmse' must be a number"),
        ({}, METRICS | {"depth/rmse": torch.ones(1, requires_grad=True) > 0}, TypeError, "must be a number"),
        ({"higher_is_better": None}, METRICS, ValueError, "must declare higher_is_better"),
        ({"higher_is_better": ("digit/acc",)}, METRICS, ValueError, "Did you mean 'digit/accuracy'"),
        ({"baselines": {"digit/accuracy": 1.0}}, METRICS, ValueError, "differ in depth/rmse"),
        ({"balancer": None, "seed": 0}, METRICS, ValueError, "must have methods and a seed"),
    ],
)
def test_mistakes_in_final_metrics(changes, metrics, error, message, tmp_path):
    tracker = start(tmp_path, enabled=False, **changes)
    with pytest.raises(error, match=message):
        tracker.log_final(metrics)
