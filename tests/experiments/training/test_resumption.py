"""Runs that are interrupted and resumed end bit for bit like undisturbed runs, in one MLflow run without double metrics."""

import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from experiments import sweep
from experiments.sweeps import runtime
from experiments.training import checkpoint_files, evaluation, loop, resumption
from experiments.training.checkpoint_files import load, load_newest, save_last
from experiments.training.data import training_batches
from tests.experiments.short_runs import ROOT, configure, prepare, runs_in
from tests.experiments.training.interruptions import STEPS, Runs, database, interrupt, raise_killed, recorded, runs, send

__all__ = ["database", "runs"]
ALWAYS = "train.checkpoint_minutes=1e-9"


def ends_undisturbed(runs, undisturbed):
    assert runs.train() == undisturbed.final
    run, metrics = runs.recorded()
    assert run.info.status == "FINISHED"
    assert metrics == undisturbed.recorded()[1]
    files = {file.name for file in runs.the_folder().iterdir()}
    assert files == {"config.yaml", "final.json", "best.pt", "last.pt"}
    assert (runs.the_folder() / "final.json").read_text() == (undisturbed.the_folder() / "final.json").read_text()


def test_signals_leave_a_run_that_resumes(runs, database):
    """In the middle of an epoch, after its last step, at the first step of a resumed process, in the middle again."""
    for steps, number in ((2, signal.SIGTERM), (STEPS - 3, signal.SIGINT), (0, signal.SIGTERM), (STEPS + 1, signal.SIGTERM)):
        error = interrupt(runs, loop, "train_step", steps, send(number))
        assert error.exit_code == 128 + number
        assert runs.recorded()[0].info.status == "KILLED"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ends_undisturbed(runs, database)


def test_a_run_that_observes_validation_losses_resumes(tmp_path):
    """The resumed run continues with the next validation batch, and ends with the weights of the undisturbed run."""
    finals = []
    for name in ("undisturbed", "killed"):
        runs = Runs(tmp_path / name, "loss_method=coba", "loss.warmup=2", "train.validation_interval=2", "track=false")
        if name == "killed":
            for step in (3, STEPS):
                interrupt(runs, loop, "train_step", step, raise_killed, ALWAYS)
        finals.append(runs.train())
        (folder,) = (runs.folder / "digits").iterdir()
        state = load(folder / "last.pt")["balancer"]
        assert state["loss_balancer.rule.observations"] == 3 * STEPS / 2 - 1
        finals.append(state["loss_balancer.rule.weights"].tolist())
    assert finals[:2] == finals[2:]
    assert len(set(finals[1])) == 4


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_during_an_evaluation(number, runs, database):
    interrupt(runs, evaluation, "to_device", number, send(signal.SIGTERM))
    state = load(runs.the_folder() / "last.pt")
    assert (state["epoch"], state["position"]) == (number, STEPS)
    ends_undisturbed(runs, database)


@pytest.mark.parametrize("words", [[], [ALWAYS]], ids=["epochs", "steps"])
def test_kills_at_several_steps(words, runs, database):
    for step in (1, STEPS + 1, 3):
        interrupt(runs, loop, "train_step", step, raise_killed, *words)
    ends_undisturbed(runs, database)


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        pytest.param(checkpoint_files, "publish", 1, marks=pytest.mark.slow),  # a written file without its name
        (Path, "replace", 3),  # the second checkpoint, after the first is renamed
        pytest.param(Path, "replace", 2, marks=pytest.mark.slow),
        (loop, "save_last", 2),  # after the metrics are written
        (loop, "finish", 0),  # after MLflow has the result
        pytest.param(resumption, "write_file", 0, marks=pytest.mark.slow),
    ],
)
def test_kills_while_a_checkpoint_is_saved(module, name, number, runs, database):
    interrupt(runs, module, name, number, raise_killed, ALWAYS)
    ends_undisturbed(runs, database)


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(runs, database):
    interrupt(runs, loop, "train_step", STEPS + 2, raise_killed, ALWAYS)
    last, previous = (runs.the_folder() / name for name in ("last.pt", "previous.pt"))
    assert (load(previous)["step"], load(last)["step"]) == (STEPS + 1, STEPS + 2)
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"last\.pt must be an intact checkpoint, but it is damaged"):
        ends_undisturbed(runs, database)


def test_every_damage_is_detected(tmp_path):
    state = {"tensor": torch.arange(50.0), "number": 0.1, "text": "a", "list": [1, (2, None)]}
    save_last(state, tmp_path)
    content = (tmp_path / "last.pt").read_bytes()
    draw = random.Random(0)
    for _ in range(400):
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        (tmp_path / "last.pt").write_bytes(changed)
        try:
            read = load(tmp_path / "last.pt")
        except ValueError:
            continue
        else:  # a change of unused bytes, such as the padding between records
            assert read.keys() == state.keys()
            assert all(torch.equal(read[key], state[key]) if key == "tensor" else read[key] == state[key] for key in state)
    for length in range(0, len(content), 50):
        (tmp_path / "last.pt").write_bytes(content[:length])
        with pytest.warns(UserWarning, match="damaged"):
            assert load_newest(tmp_path) is None


def test_the_position_in_the_data_is_found_without_reading(tiny):
    data, config = list(range(100)), configure("train.batch_size=7", "seed=3")
    whole = training_batches(data, config).sampler
    epochs = [list(whole) for _ in range(3)]
    begun = training_batches(data, config).sampler
    list(begun)
    second = iter(begun)
    assert [next(second) for _ in range(4)] == epochs[1][:4]
    resumed = training_batches(data, config).sampler
    resumed.resume(begun.state(4), 4)
    assert list(resumed) == epochs[1][4:]
    assert list(resumed) == epochs[2]
    between = training_batches(data, config).sampler
    between.resume(resumed.state(0), 0)
    assert list(between) == list(resumed)


def printed(words):
    console = Console(width=300, record=True, file=io.StringIO())
    return prepare(*words, "resume=true", console=console), console.export_text()


def test_only_an_unfinished_run_with_this_configuration_is_resumed(tiny, monkeypatch):
    monkeypatch.setattr(resumption, "PATIENCE", 0.1)
    words = tiny("digits", "log_model=false")
    first, text = printed(words)
    assert "A new run starts" in text
    running, text = printed(words)  # as the first run keeps its lock
    assert running.folder != first.folder
    first.lock.release()
    running.lock.release()
    newest, text = printed([*words, "log_every=3"])
    assert newest.folder == max(first.folder, running.folder)
    assert f"Resuming the run in {newest.folder}" in text
    assert "A new run starts" in printed([*words, "seed=1"])[1]
    loop.train(newest)
    assert printed(words)[0].folder == min(first.folder, running.folder)


def test_a_run_that_mlflow_does_not_have_is_not_resumed(runs):
    interrupt(runs, loop, "train_step", 2, raise_killed)
    (run,), client = runs_in(runs.folder)
    client.delete_run(run.info.run_id)
    assert "A new run starts" in printed(runs.words)[1]


def test_a_sweep_resumes_interrupted_runs(runs, database, monkeypatch):
    interrupt(runs, loop, "train_step", STEPS + 2, raise_killed, ALWAYS)
    monkeypatch.setattr(runtime, "estimate_run", lambda config: 1.0)
    words = [word for word in runs.words if not word.startswith("--gradient")]
    assert sweep.main([*words, "--gradient_method=pcgrad", "--jobs=1", "--no_baselines"]) == 0
    every, client = runs_in(runs.folder)
    (parent,) = [run for run in every if run.data.tags["kind"] == "sweep"]
    (run,) = [run for run in every if run.data.tags["kind"] == "run"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    for name, value in database.final.items():
        assert run.data.metrics[f"final/{name}"] == value
    assert sorted(m.step for m in client.get_metric_history(run.info.run_id, "loss/sum")) == list(range(3 * STEPS))


@pytest.mark.parametrize("words", [["train.precision=fp16", "train.optimizer=sgd", "optimizer.momentum=0.9", "train.lr=1e-4"]])
def test_other_precisions_and_optimizers_resume(words, tmp_path):
    """The first steps overflow, so that the scale changes."""
    undisturbed, resumed = (Runs(tmp_path / name, *words, "track=false") for name in ("undisturbed", "resumed"))
    final = undisturbed.train()
    interrupt(resumed, loop, "train_step", STEPS + 2, send(signal.SIGTERM))
    scaler = load(resumed.the_folder() / "last.pt")["scaler"]
    assert scaler["scale"] < 2.0**16
    assert resumed.train() == final


COMMAND = [
    *(sys.executable, str(ROOT / "experiments/trainer.py"), "--loss_method=rlw", "--gradient_method=pcgrad", "log_every=5"),
    *("data.train_pairs=1000", "train.batch_size=16", "train.epochs=60", "log_model=false", "train.checkpoint_minutes=0.004"),
]


def kill_at_random(command, folder, draw):
    """Start or resume a trainer, kill it within seconds of its first checkpoint, or at its start, and return its exit code."""
    begin = time.time()
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen([*command, "resume=true"], cwd=folder, **options)
    saved = []
    while not saved and process.poll() is None:
        time.sleep(0.05)
        saved = [file for file in folder.glob("runs/digits/*/last.pt") if file.stat().st_mtime > begin]
    time.sleep(draw.uniform(0, 1.5))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


@pytest.mark.slow
def test_twenty_kills_of_a_real_run(tmp_path):
    """The kills hit steps, evaluations, and the saving of checkpoints."""
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    subprocess.run(COMMAND, cwd=tmp_path / "undisturbed", check=True, stdout=subprocess.DEVNULL)
    draw = random.Random(0)
    for _ in range(20):
        assert kill_at_random(COMMAND, tmp_path / "killed", draw) == -signal.SIGKILL
    subprocess.run([*COMMAND, "resume=true"], cwd=tmp_path / "killed", check=True, stdout=subprocess.DEVNULL)
    (expected,), (final,) = ([*tmp_path.glob(f"{name}/runs/digits/*/final.json")] for name in ("undisturbed", "killed"))
    assert final.read_bytes() == expected.read_bytes()
    assert recorded(tmp_path / "killed/runs")[1] == recorded(tmp_path / "undisturbed/runs")[1]
