"""Grids of runs: planned, run in parallel, continued after whatever ended them; single-task baselines."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient

from experiments import baselines, compare, sweep
from experiments.recording.store import Store
from experiments.sweeps import runtime as estimate
from experiments.training import loop
from tests.experiments.short_runs import configure

ROOT = Path(__file__).parents[1]
TINY = ["data.train_pairs=128", "data.validation_pairs=50", "data.test_pairs=50", "train.epochs=1", "log_model=false"]
GRID = ["--loss_method=ls,uw", "--gradient_method=none,pcgrad", "--seeds=2", "--jobs=1", *TINY]


@pytest.fixture(autouse=True)
def quick_estimates(monkeypatch):
    monkeypatch.setattr(estimate, "BUDGET", 0.01)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A small sweep in this process."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "BUDGET", 0.01)
        assert sweep.main([*GRID, f"--output_dir={folder}"]) == 0
    return folder


@pytest.fixture
def again(swept, tmp_path):
    """A copy of it, to be changed."""
    shutil.copy(swept / "mlflow.db", tmp_path / "mlflow.db")
    return tmp_path


def runs_in(folder, condition=""):
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


def test_one_parent_and_a_child_for_each_run_and_baseline(swept):
    (parent,), _ = runs_in(swept, "tags.kind = 'sweep'")
    assert parent.info.status == "FINISHED"
    children, _ = runs_in(swept, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    done = {
        (r.data.tags["kind"], r.data.tags["loss_method"], r.data.tags["gradient_method"], r.data.tags["seed"]) for r in children
    }
    grid = {("run", loss, gradient, seed) for loss in ("ls", "uw") for gradient in ("none", "pcgrad") for seed in "01"}
    assert done == grid | {("baseline", "stl", "none", seed) for seed in "01"}
    assert len(children) == 8 + 4 * 2
    assert {r.info.status for r in children} == {"FINISHED"}
    assert parent.data.metrics == {"runs/finished": 16, "runs/failed": 0}


def test_the_number_of_threads_is_as_before(tmp_path):
    before = torch.get_num_threads()
    assert before == 1
    assert sweep.main(["--loss_method=ls", "--jobs=1", *TINY, "track=false", f"--output_dir={tmp_path}"]) == 0
    assert torch.get_num_threads() == before


def test_what_is_finished_is_not_run_again(again, capfd, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("a finished run was repeated"))
    assert sweep.main([*GRID, f"--output_dir={again}"]) == 0
    assert "0 runs to do, 16 are finished already" in capfd.readouterr().out
    assert len(runs_in(again, "tags.kind = 'sweep'")[0]) == 1


def test_one_more_seed_and_method_run_only_what_is_new(again, capfd):
    words = ["--loss_method=ls,rlw", "--gradient_method=none", "--seeds=0,2", "--jobs=1", "--dry_run", *TINY]
    assert sweep.main([*words, f"--output_dir={again}"]) == 0
    out = capfd.readouterr().out
    assert "7 runs to do, 5 are finished already" in out  # ls with seed 0, and four baselines
    assert "stl right" in out
    assert len(runs_in(again)[0]) == 17


def test_an_interrupted_sweep_goes_on_and_ends_as_an_undisturbed_one(swept, tmp_path, capfd, monkeypatch):
    shutil.copy(swept / "mlflow.db", tmp_path / "mlflow.db")
    for run in runs_in(tmp_path)[0]:
        runs_in(tmp_path)[1].delete_run(run.info.run_id)
    train = loop.train

    def cut_off(run, parent):
        if run.config.loss_method == "uw":
            raise KeyboardInterrupt
        return train(run, parent)

    monkeypatch.setattr(loop, "train", cut_off)
    command = [*GRID, f"--output_dir={tmp_path}"]
    assert sweep.main(command) == 130
    assert "goes on from here" in capfd.readouterr().out
    assert [run.info.status for run in runs_in(tmp_path, "tags.kind = 'sweep'")[0]] == ["KILLED"]
    finished = {run.info.run_id for run in runs_in(tmp_path, "attributes.status = 'FINISHED'")[0]}
    assert len(finished) == 12
    monkeypatch.setattr(loop, "train", train)
    assert sweep.main(command) == 0
    assert "4 runs finished, 0 failed, 12 were there" in capfd.readouterr().out
    (parent,), _ = runs_in(tmp_path, "tags.kind = 'sweep'")
    assert parent.info.status == "FINISHED"
    assert without_costs(markdown(tmp_path, capfd)) == without_costs(markdown(swept, capfd))


def test_a_run_that_fails_does_not_end_the_sweep_and_is_tried_again(again, capfd, monkeypatch):
    train = loop.train
    broken = [True]

    def fails(run, parent):
        if broken[0] and run.config.seed == 0:
            raise ZeroDivisionError("a division by zero")
        return train(run, parent)

    monkeypatch.setattr(loop, "train", fails)
    command = ["--loss_method=rlw", "--seeds=2", "--jobs=1", *TINY, f"--output_dir={again}"]
    assert sweep.main(command) == 1
    out = capfd.readouterr().out
    assert "1 runs finished, 1 failed" in out
    assert "failed: --loss_method=rlw --gradient_method=none --seed=0" in out
    assert "ZeroDivisionError: a division by zero" in out
    parents, _ = runs_in(again, "tags.kind = 'sweep'")
    assert parents[0].info.status == "FAILED"
    broken[0] = False
    assert sweep.main(command) == 0
    assert "1 runs finished, 0 failed" in capfd.readouterr().out
    assert len(runs_in(again, "tags.kind = 'sweep'")[0]) == 2


def test_a_method_that_cannot_be_timed_does_not_end_the_plan(tmp_path, capfd, monkeypatch):
    step = loop.train_step

    def fails(run, *arguments):
        if run.config.loss_method == "uw":
            raise ValueError("its first step fails")
        return step(run, *arguments)

    for module in (estimate, loop):
        monkeypatch.setattr(module, "train_step", fails)
    words = ["--loss_method=ls,uw", "--jobs=1", *TINY, "track=false", f"--output_dir={tmp_path}"]
    assert sweep.main(words) == 1
    out = capfd.readouterr().out
    assert "5 runs finished, 1 failed" in out
    assert "ValueError: its first step fails" in out


def test_ctrl_c_while_the_plan_is_timed(tmp_path, capfd, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(estimate, "of_a_run", interrupted)
    assert sweep.main(["--jobs=1", *TINY, "track=false", f"--output_dir={tmp_path}"]) == 130
    assert "goes on from here" in capfd.readouterr().out


def test_without_tracking_everything_runs(tmp_path, capfd):
    assert sweep.main(["--loss_method=uw", "--jobs=1", *TINY, "track=false", f"--output_dir={tmp_path}"]) == 0
    assert "5 runs finished" in capfd.readouterr().out
    assert not (tmp_path / "mlflow.db").exists()


def test_the_shipped_baselines_are_not_measured_again(tmp_path, capfd):
    assert sweep.main(["--loss_method=uw", "--jobs=1", "--dry_run", f"--output_dir={tmp_path}"]) == 0
    out = capfd.readouterr().out
    assert "1 runs to do" in out
    assert "stl" not in out
    assert list(tmp_path.iterdir()) == []  # a plan writes nothing


def test_pairings_without_effect_are_told_with_the_plan(tmp_path, capfd):
    words = ["--loss_method=ls,uw", "--gradient_method=nashmtl", "--jobs=1", "--dry_run", *TINY, f"--output_dir={tmp_path}"]
    assert sweep.main(words) == 0
    assert "note: nashmtl ignores positive loss weights: uw has no effect." in capfd.readouterr().out


def test_chains_and_options_of_a_method(tmp_path, capfd):
    words = ["--loss_method=scaleinvls+rlw", "loss.rlw.scale=4", "--jobs=1", "--dry_run", *TINY, f"--output_dir={tmp_path}"]
    assert sweep.main(words) == 0
    assert "scaleinvls+rlw" in capfd.readouterr().out


def test_an_estimate_follows_the_number_of_epochs(tmp_path):
    def seconds(epochs):
        config = configure(*TINY[:3], f"train.epochs={epochs}")
        return estimate.of_a_run(config)

    assert 10 < seconds(1000) / seconds(10) < 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss_method=ls,mgda"], "Unknown loss balancer 'mgda'"),
        (["--gradient_method=none,pcgard"], "Did you mean 'pcgrad'?"),
        (["--experiment=digit"], "Did you mean 'digits'?"),
        (["--loss_method=ls,ls"], "must name each once"),
        (["--seeds=0"], "--seeds must be how many"),
        (["--seeds=two"], "--seeds must be how many"),
        (["--seeds=1,1"], "must differ"),
        (["--jobs=0"], "--jobs must be at least 1"),
        (["--backend=mpi"], "invalid choice: 'mpi'"),
        (["--cluster=tcp://host:1"], "--cluster needs --backend"),
        (["seed=1"], "use --seeds in place of seed"),
        (["loss_method=uw"], "use --loss_method in place of"),
        (["train.epoch=1"], "Unknown key 'train.epoch'"),
        (["epochs"], "must read key=value"),
        (["--loss_method=go4align", "loss.num_groups=0"], "at least 1"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        sweep.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        sweep.main(["--help"])
    assert caught.value.code == 0
    assert "example:\n  python experiments/sweep.py --experiment=digits" in capsys.readouterr().out


# --- baselines --------------------------------------------------------------------------------------------------------


def test_a_baseline_is_told_by_its_own_task():
    jobs = sweep.baseline_jobs(["train.epochs=1"], [0])
    outcome = sweep.Outcome({"left/accuracy": 0.5, "right/accuracy": 0.1, "sum/mae": 2.0, "delta_m": 3.0}, None, 4.0)
    assert [sweep._told(job, outcome) for job in jobs[:2]] == [
        "stl left, seed 0: left/accuracy 0.5000 (4 s)",
        "stl right, seed 0: right/accuracy 0.1000 (4 s)",
    ]


def test_baselines_are_written_from_the_runs(again, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("a finished run was repeated"))
    file = tmp_path / "baselines.yaml"
    assert baselines.main(["--seeds=2", "--jobs=1", f"--output={file}", *TINY, f"--output_dir={again}"]) == 0
    stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert list(stored["metrics"]) == ["left/accuracy", "right/accuracy", "sum/mae", "reconstruction/rmse"]
    assert stored["settings"]["train.epochs"] == "1"
    alone = {
        run.settings["loss.main_task"]: run
        for run in Store("digits", str(again)).runs()
        if run.seed == 1 and run.loss_method == "stl"
    }
    assert stored["metrics"]["sum/mae"]["runs"][1] == pytest.approx(alone["2"].metrics["sum/mae"], abs=1e-6)
    for row in stored["metrics"].values():
        assert len(row["runs"]) == 2
        assert row["mean"] == pytest.approx(sum(row["runs"]) / 2, abs=1e-6)
    assert "--seeds=2" in stored["command"]


# --- whole processes --------------------------------------------------------------------------------------------------


def start(folder, *words, **options):
    command = [sys.executable, str(ROOT / "experiments/sweep.py"), *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def descendants(pid):
    """Processes below one, by Linux's list of children."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found += [child, *descendants(child)]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes as Linux lists them")
def test_sigkill_half_way_then_the_same_command(tmp_path, capfd):
    words = ["--loss_method=ls,uw", "--gradient_method=none,pcgrad", "--seeds=2", "--jobs=2"]
    words += ["data.train_pairs=1024", "data.validation_pairs=50", "data.test_pairs=50", "train.epochs=4"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir(), whole.mkdir()
    process = start(killed, *words, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    ended = 0
    for line in process.stdout:
        ended += bool(re.match(r".*, seed \d: ", line))
        if ended == 10:
            break
    workers = descendants(process.pid)
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    end = time.time() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.time() < end, "workers outlive their sweep"
        time.sleep(0.2)
    before = {run.info.run_id for run in runs_in(killed / "runs", "attributes.status = 'FINISHED'")[0]}
    assert 10 <= len(before) < 16
    out, _ = start(killed, *words).communicate()
    assert f"{16 - len(before)} runs finished, 0 failed, {len(before)} were there" in out
    runs, _ = runs_in(killed / "runs", "attributes.status = 'FINISHED'")
    prints = [run.data.tags["fingerprint"] for run in runs if run.data.tags["kind"] != "sweep"]
    assert len(prints) == len(set(prints)) == 16
    assert runs_in(killed / "runs", "attributes.status = 'RUNNING'")[0] == []
    start(whole, *words).communicate()
    assert without_costs(markdown(killed / "runs", capfd)) == without_costs(markdown(whole / "runs", capfd))


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_on_a_dask_cluster(tmp_path, free_port):
    pytest.importorskip("distributed", reason="Dask is not installed (pip install 'mtl-balance[dask]')")
    address = f"tcp://127.0.0.1:{free_port}"
    programs = [
        ["scheduler", "--host", "127.0.0.1", "--port", str(free_port), "--no-dashboard"],
        ["worker", address, "--nthreads", "1", "--nworkers", "2", "--no-dashboard"],
    ]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "dask", *words], cwd=elsewhere, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for words in programs
    ]
    try:
        for _ in range(30):  # until the workers are there
            time.sleep(1)
            out, _ = start(tmp_path, "--loss_method=ls,uw", "--backend=dask", f"--cluster={address}", *TINY).communicate()
            if "has no workers" not in out and "does not answer" not in out:
                break
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(timeout=30)
    assert "6 runs finished, 0 failed" in out
    assert len(runs_in(tmp_path / "runs", "attributes.status = 'FINISHED'")[0]) == 7


@pytest.mark.slow
def test_on_a_ray_cluster(tmp_path, free_port):
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'mtl-balance[ray]')")
    ray = [str(Path(sys.executable).parent / "ray")]
    short = tempfile.mkdtemp(prefix="ray-")  # its sockets need a short path
    head = ["start", "--head", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", f"--port={free_port}"]
    subprocess.run([*ray, *head, f"--temp-dir={short}"], check=True, capture_output=True)
    try:
        words = ["--loss_method=ls,uw", "--backend=ray", f"--cluster=127.0.0.1:{free_port}", *TINY]
        out, _ = start(tmp_path, *words).communicate()
    finally:
        subprocess.run([*ray, "stop"], check=True, capture_output=True)
        shutil.rmtree(short, ignore_errors=True)
    assert "6 runs finished, 0 failed" in out
    assert len(runs_in(tmp_path / "runs", "attributes.status = 'FINISHED'")[0]) == 7


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_a_cluster_that_is_not_there(backend, tmp_path, free_port):
    pytest.importorskip("ray" if backend == "ray" else "distributed", reason="not installed")
    address = f"127.0.0.1:{free_port}" if backend == "ray" else f"tcp://127.0.0.1:{free_port}"
    process = start(tmp_path, f"--backend={backend}", f"--cluster={address}", *TINY)
    out, _ = process.communicate()
    assert process.returncode == 2
    assert "does not answer" in out
    assert "Traceback" not in out
