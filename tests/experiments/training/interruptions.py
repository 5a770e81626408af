"""Runs of digits that are interrupted at chosen steps and resumed, and the record that they leave."""

import os
import shutil

import pytest

from balance.tracking import Tracker
from experiments.problems import digits
from experiments.training import loop
from experiments.training.interruption import Interrupted
from tests.experiments.short_runs import prepare, runs_in

STEPS = 4  # of an epoch
WORDS = [  # rules and data that draw random numbers, and rates that follow the score
    *("--loss_method=rlw+uw", "--gradient_method=pcgrad", "train.batch_size=32", "train.epochs=3", "log_every=1"),
    *("data.train_pairs=128", "data.validation_pairs=50", "data.test_pairs=50", "log_model=false"),
    *("train.schedule=plateau", "train.patience=0", "train.warmup_steps=3"),
]


def recorded(folder):
    """The only MLflow run below a folder, and its metrics by name as (step, value), without costs."""
    (run,), client = runs_in(folder)
    names = [name for name in run.data.metrics if not name.startswith("cost/")]
    return run, {name: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)) for name in names}


class Killed(BaseException):
    """Stands for SIGKILL in tests of one process: nothing is written after it."""


class Runs:
    """Runs with the same configuration in one output folder."""

    def __init__(self, folder, *words):
        self.folder = folder
        self.words = [*WORDS, *words, f"output_dir={folder}"]

    def train(self, *words):
        return loop.train(prepare(*self.words, "resume=true", *words))

    def recorded(self):
        return recorded(self.folder)

    def the_folder(self):
        (folder,) = (self.folder / "digits").iterdir()
        return folder


def with_dropout(build):
    def build_model():
        from torch import nn

        model = build()
        model.trunk.append(nn.Dropout(0.2))
        return model

    return build_model


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """An undisturbed run, and an empty tracking store, whose creation takes seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "build_model", with_dropout(digits.build_model))
        runs = Runs(folder)
        shutil.copy(empty_store(folder), folder / "empty.db")
        runs.final = runs.train()
    return runs


def empty_store(folder):
    from balance.tracking import connect

    connect("balance/digits", folder)
    return folder / "mlflow.db"


@pytest.fixture
def runs(database, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "build_model", with_dropout(digits.build_model))
    shutil.copy(database.folder / "empty.db", tmp_path / "mlflow.db")
    leave = Tracker.__exit__

    def dies(tracker, kind, *rest):
        return None if kind is Killed else leave(tracker, kind, *rest)

    monkeypatch.setattr(Tracker, "__exit__", dies)
    return Runs(tmp_path)


def before_call(monkeypatch, module, name, number, act):
    """Do something before one call of a function, counted from 0."""
    function, calls = getattr(module, name), []

    def watched(*arguments, **keywords):
        calls.append(None)
        if len(calls) == number + 1:
            act()
        return function(*arguments, **keywords)

    monkeypatch.setattr(module, name, watched)


def raise_killed():
    raise Killed


def send(number):
    return lambda: os.kill(os.getpid(), number)


def interrupt(runs, module, name, number, act, *words):
    """Train until an interruption; return the exception."""
    with pytest.MonkeyPatch.context() as patch:
        before_call(patch, module, name, number, act)
        with pytest.raises((Killed, Interrupted)) as caught:
            runs.train(*words)
    return caught.value
