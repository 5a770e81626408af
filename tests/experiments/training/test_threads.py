"""The number of threads of a run and of the runs of a sweep."""

import os

import pytest
import torch

from experiments import baselines, diagnose, front, sweep, trainer
from experiments.problems import base as problems
from experiments.sweeps import execute, runtime
from experiments.sweeps.job import make_job
from experiments.training import diagnosis, loop, threads
from tests.experiments.short_runs import configure
from tests.experiments.sweeps.small_sweeps import TINY


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    """A process that may use four cores, and begins with three threads."""
    monkeypatch.setattr(threads, "cores", lambda: 4)
    with threads.restored():
        torch.set_num_threads(3)
        yield
        assert torch.get_num_threads() == 3  # no command changes the number for its caller


@pytest.fixture
def trained(monkeypatch):
    """The numbers of threads with which networks were trained."""
    numbers = []
    monkeypatch.setattr(loop, "train", lambda *_: numbers.append(torch.get_num_threads()) or {})
    monkeypatch.setattr(trainer, "train", lambda *_: numbers.append(torch.get_num_threads()))
    return numbers


@pytest.mark.parametrize("name", problems.names())
def test_problems_that_ship_with_the_project_declare_one_thread(name):
    assert configure(f"experiment={name}").train.threads == 1
    assert configure(f"experiment={name}", "train.threads=2").train.threads == 2


@pytest.mark.parametrize("name", [name for name in problems.names() if problems.find(name).ON_DISK is not None])
def test_data_sets_on_disk_declare_no_number(name):
    assert configure(f"experiment={name}", "data.path=elsewhere").train.threads is None


@pytest.mark.parametrize(("words", "number"), [([], 1), (["train.threads=2"], 2), (["train.threads=null"], 3)])
def test_the_trainer_uses_the_number_of_the_problem_unless_one_is_given(words, number, trained, tmp_path):
    assert trainer.main([*TINY, *words, "track=false", f"output_dir={tmp_path}"]) == 0
    assert trained == [number]


def test_the_diagnosis_uses_the_number_too(monkeypatch, capsys):
    def build(config):
        raise ValueError(f"{torch.get_num_threads()} threads")

    monkeypatch.setattr(diagnosis, "build", build)
    with pytest.raises(SystemExit):
        diagnose.main(["train.threads=2"])
    assert "2 threads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "jobs", "number"),
    [([], 4, 1), ([], 2, 1), (["train.threads=2"], 2, 2), (["train.threads=null"], 2, 2), (["train.threads=null"], 4, 1)],
)
def test_the_runs_of_a_sweep_have_no_more_threads_than_there_are_cores(words, jobs, number, trained, monkeypatch, tmp_path):
    calls = []

    def in_this_process(jobs, workers, backend):
        calls.append(workers)
        for work, (k, overrides, options), _ in jobs:
            yield work(k, overrides, options._replace(owner=None))  # a worker ends with the owner, its parent process

    monkeypatch.setattr(execute, "_parallel", in_this_process)
    monkeypatch.setattr(runtime, "estimate_run", lambda config: trained.append(torch.get_num_threads()) or 1.0)
    options = ["--no_baselines", f"--jobs={jobs}", *TINY, *words, "track=false", f"output_dir={tmp_path}"]
    assert sweep.main(["--loss_method=ls,uw", *options]) == 0
    assert calls == [jobs]
    assert trained == [number] * 4  # two estimates, two runs
    assert jobs * number <= 4


@pytest.mark.parametrize(("words", "workers"), [([], 4), (["train.threads=2"], 2), (["train.threads=8"], 1)])
def test_as_many_runs_at_a_time_as_have_cores(words, workers):
    assert threads.runs_at_a_time([make_job(words).config], None) == workers


def test_more_runs_than_cores_are_fine_with_one_thread_each():
    assert threads.runs_at_a_time([configure()], 8) == 8
    assert threads.runs_at_a_time([configure("train.threads=8")], 1) == 1  # as in the trainer


@pytest.mark.parametrize("command", [sweep, baselines, front])
def test_runs_with_more_threads_than_cores_are_refused(command, capsys, tmp_path):
    words = ["--jobs=3", "train.threads=2", f"output_dir={tmp_path}"]
    words += [f"--output={tmp_path / 'baselines.yaml'}"] if command is baselines else ["track=false"]
    with pytest.raises(SystemExit):
        command.main(words)
    assert "--jobs must be at most 2 with train.threads=2 on 4 cores, but got 3." in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_taskset_limits_the_cores(monkeypatch):
    monkeypatch.undo()
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert threads.cores() == 1
    finally:
        os.sched_setaffinity(0, before)
