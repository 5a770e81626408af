"""Demands of every problem's folder."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from experiments.problems.base import FOLDER, Network, find, names, summaries
from tests.experiments.short_runs import TINY, prepare

CHANGELOG = (Path(__file__).parents[3] / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.fixture(params=names())
def name(request):
    if request.param == "quantum_chemistry":
        pytest.importorskip("torch_geometric")
    return request.param


def test_problem_has_a_line_in_the_changelog(name):
    assert f"`{name}`" in CHANGELOG, f"Add a line with `{name}` to CHANGELOG.md."


def test_problem_has_a_summary(name):
    assert 20 < len(summaries()[name]) < 140
    assert summaries()[name].endswith(".")


def test_every_entry_of_its_configuration_has_a_role(name):
    problem = find(name)
    for config in filter(None, (problem.DataConfig, problem.ModelConfig, problem.AgentConfig)):
        for entry in fields(config):
            assert entry.metadata.get("help"), f"Declare {config.__name__}.{entry.name} of '{name}' with setting(help=...)."


def test_its_data_network_losses_and_metrics_fit_each_other(name, cache, tmp_path):
    cached = [f"data.cache={cache}"] if "cache" in {entry.name for entry in fields(find(name).DataConfig)} else []
    run = prepare(f"--experiment={name}", f"output_dir={tmp_path}", "track=false", *cached, *TINY.get(name, []))
    problem, batch = run.problem, run.data.validation[[0, 1 % len(run.data.validation)]]
    if run.agent:
        batch = next(iter(run.batches))
        run.agent.after_step()
    assert isinstance(run.model, Network)
    assert {*run.model.trained()} == {*run.model.trunk.parameters(), *run.model.heads.parameters()}
    assert run.agent or len(run.model.trained()) == len([*run.model.parameters()])
    outputs = run.model(batch[0])
    assert tuple(outputs) == problem.TASKS
    losses = problem.losses(outputs, batch)
    assert set(losses) <= set(problem.TASKS)
    assert all(loss.shape == () and loss.requires_grad for loss in losses.values())
    targets = problem.targets(batch)
    for metric, of_metric in problem.metrics().items():
        task, _, measure = metric.partition("/")
        assert measure
        if run.agent:
            for values in run.agent.evaluate(run.data.validation):
                of_metric.update(values[metric])
        else:
            of_metric.update(outputs[task].detach(), targets[task])
        assert isinstance(of_metric.compute(), torch.Tensor)
    assert set(problem.metrics()) >= problem.HIGHER_IS_BETTER or problem.task_names
    assert {metric.partition("/")[0] for metric in problem.metrics()} == set(problem.TASKS)


def test_no_source_lists_the_names_of_all_problems():
    """Problems are found by their folders, so that a new one needs no edit elsewhere."""
    for path in (FOLDER.parent).rglob("*.py"):
        mentioned = [name for name in names() if re.search(rf"['\"]{name}['\"]", path.read_text(encoding="utf-8"))]
        assert len(mentioned) < 3, path
