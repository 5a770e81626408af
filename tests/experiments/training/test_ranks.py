"""Runs on several processes: every problem trains, and ends like on one process."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from experiments.problems.base import find
from tests.distributed.processes import run_on_ranks
from tests.experiments.short_runs import NAMES, ROOT
from tests.experiments.training.interruptions import recorded
from tests.experiments.training.on_ranks import assert_equal, train_all

METHODS = (["--loss_method=rlw", "--gradient_method=pcgrad"], ["--loss_method=famo"], ["train.precision=fp16"])


@pytest.mark.parametrize("methods", [METHODS[:1], pytest.param(METHODS, marks=pytest.mark.slow)], ids=["one", "three"])
def test_two_processes_train_digits_like_one(methods, tiny, tmp_path):
    """Of 97 samples the ranks have 12 and 11, or 3 and 2."""
    words = ["data.train_pairs=97", "train.batch_size=23", "train.epochs=2", "train.max_norm=1"]
    cases = [tiny("digits", *method, *words) for method in methods]
    one = train_all(0, cases)
    two = run_on_ranks(train_all, 2, tmp_path, cases)
    assert_equal(two[0], two[1], rtol=0, atol=0)
    assert [result["final"] for result in two[0]] == [result["final"] for result in two[1]]
    assert_equal(two[0][:2], one[:2], rtol=1e-3, atol=1e-4)  # Adam turns rounding into up to a step of 1e-3
    assert_equal(two[0][2:], one[2:], rtol=1e-1, atol=1e-3)
    assert len([*(tmp_path / "runs/digits").iterdir()]) == 2 * len(cases)


@pytest.mark.slow
def test_every_problem_trains_on_two_processes(tiny, tmp_path):
    names = [name for name in NAMES if find(name).build_agent is None]
    cases = [tiny(name, "--loss_method=go4align", "--gradient_method=mgda", "train.optimizer=sgd") for name in names]
    one = train_all(0, cases)
    first, second = run_on_ranks(train_all, 2, tmp_path, cases)
    assert_equal(first, second, rtol=0, atol=0)
    for name, mine, theirs in zip(names, first, one, strict=True):
        assert mine["final"].keys() == theirs["final"].keys()
        # neither statistics of batch normalisation nor augmentation
        if name in ("burgers", "digits", "llm", "toy", "multimnist", "regression100"):
            assert_equal([mine], [theirs], rtol=1e-3, atol=1e-5)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
COMMAND = [
    *(*TORCHRUN, str(ROOT / "experiments/trainer.py"), "--loss_method=rlw", "--gradient_method=pcgrad", "log_every=5"),
    *("data.train_pairs=500", "train.batch_size=16", "train.epochs=20", "log_model=false", "train.checkpoint_minutes=0.004"),
]


def start(folder, *words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen([*COMMAND, *words], cwd=folder, env=environment, **options)


def finish(process):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output


def is_rank(process):
    try:
        return "RANK" in process.environ()
    except psutil.Error:  # it has ended, or has just begun
        return False


def workers_of(process):
    """The processes of the two ranks, once they train."""
    for _ in range(600):
        children = [child for child in psutil.Process(process.pid).children(recursive=True) if is_rank(child)]
        if len(children) == 2:
            return children
        time.sleep(0.1)
    raise AssertionError("torchrun has started no processes")


@pytest.mark.slow
def test_five_kills_of_a_run_on_two_processes(tmp_path):
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    finish(start(tmp_path / "undisturbed"))
    draw = random.Random(0)
    for _ in range(5):
        process = start(tmp_path / "killed", "resume=true")
        workers = workers_of(process)
        time.sleep(draw.uniform(2, 15))
        for victim in (psutil.Process(process.pid), *workers):
            victim.kill()
        process.communicate()
    finish(start(tmp_path / "killed", "resume=true"))
    (expected,), (final,) = ([*tmp_path.glob(f"{name}/runs/digits/*/final.json")] for name in ("undisturbed", "killed"))
    assert final.read_bytes() == expected.read_bytes()
    assert recorded(tmp_path / "killed/runs")[1] == recorded(tmp_path / "undisturbed/runs")[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_ends_the_job_within_a_minute(tmp_path, victim):
    process = start(tmp_path, "train.epochs=1000")
    workers = sorted(workers_of(process), key=lambda worker: int(worker.environ()["RANK"]))
    time.sleep(15)
    workers[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert time.monotonic() - begin < 60
    assert process.returncode != 0
    assert "SIGKILL" in output or "exitcode  : -9" in output.replace("exitcode: ", "exitcode  : ")
