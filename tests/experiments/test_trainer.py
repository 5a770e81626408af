"""Every experiment and every pairing of methods through the one trainer, as a user starts it."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from balance import gradient_balancers, loss_balancers
from experiments import trainer
from experiments.problems import base as experiment
from experiments.training import loop
from tests.experiments.short_runs import BOTH, DIGITS, NAMES, ROOT, finite_metrics, prepare, runs_in, train

FAST = {("uw", "pcgrad"), *((loss, None) for loss in ("ls", "stl", "rlw", "dwa", "famo", "igbv2", "coba", "go4align"))}
PAIRS = [
    pytest.param(loss, gradient, marks=[] if (loss, gradient) in FAST else pytest.mark.slow)
    for loss in loss_balancers.names()
    for gradient in (None, *gradient_balancers.names())
]


@pytest.mark.filterwarnings("ignore:mgda gives all weight", "ignore:nashmtl ignores positive loss weights")
@pytest.mark.parametrize(("loss", "gradient"), PAIRS)
def test_every_pairing_trains_digits_for_one_epoch(loss, gradient, tmp_path):
    chosen = [f"--loss_method={loss}", *([f"--gradient_method={gradient}"] if gradient else [])]
    arguments = [*chosen, "train.epochs=1", "data.train_pairs=3000", "track=false", f"output_dir={tmp_path}"]
    run = prepare(*arguments)
    assert run.balancer.heads == (gradient_balancers.heads(gradient) if gradient else "unweighted")
    final = loop.train(run)
    assert all(torch.tensor(value).isfinite() for value in final.values())
    if loss != "stl":  # an untrained network, which answers 0, has 9 and 0.44
        assert final["sum/mae"] < 7 or final["reconstruction/rmse"] < 0.35


def test_every_experiment_is_tested():
    assert set(NAMES) == set(experiment.names())


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_on_what_ships_with_the_project(name, tiny, tmp_path):
    run = prepare(*tiny(name, *BOTH))
    before = {key: value.clone() for key, value in run.model.named_parameters()}
    final = loop.train(run)
    summaries = {"all/success", "all/best_success", "all/last_success", "all/area"} if run.problem.summarize else set()
    assert finite_metrics(final) == set(run.problem.metrics()) | summaries
    assert ("delta_m" in final) == (name in ("digits", "nyuv2"))  # which have single-task numbers of this network
    assert any(not torch.equal(value, before[key]) for key, value in run.model.trunk.named_parameters(prefix="trunk"))
    (folder,) = (tmp_path / "runs" / name).iterdir()
    assert {file.name for file in folder.iterdir()} == {"config.yaml", "final.json", "best.pt", "last.pt"}
    assert json.loads((folder / "final.json").read_text(encoding="utf-8")) == final


def test_output_goes_below_the_current_directory(demo):
    folder, printed = demo
    assert [path.name for path in folder.iterdir()] == ["runs"]
    (run_folder,) = (folder / "runs" / "digits").iterdir()
    assert "go4align-pcgrad-seed4" in run_folder.name
    final = json.loads((run_folder / "final.json").read_text(encoding="utf-8"))
    assert f"delta_m {final['delta_m']:+.2f} %" in printed
    for task in ("left", "right", "sum", "reconstruction"):
        assert task in printed
    checkpoint = torch.load(run_folder / "best.pt")
    assert checkpoint["epoch"] in (1, 2)
    assert "trunk.0.weight" in checkpoint["model"]
    assert yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))["train"]["epochs"] == 2


def test_same_seed_same_result(tmp_path):
    def result(seed):
        return train(
            "--loss_method=rlw", "--gradient_method=pcgrad", *DIGITS, f"--seed={seed}", "track=false", f"output_dir={tmp_path}"
        )

    assert result(0) == result(0) != result(1)


def test_features_as_source(tmp_path):
    arguments = ("--loss_method=uw", "--gradient_method=mgda", "balancer.source=features", "balancer.scale=norm")
    assert train(*arguments, *DIGITS, "track=false", f"output_dir={tmp_path}")


GRAMIAN_RULES = [name for name in gradient_balancers.names() if gradient_balancers.sees(name) == "gramian"]
MEASURES = [["balancer.source=parameters"], ["balancer.source=features"], ["balancer.measure=[7.*]"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:nashmtl ignores positive loss weights")
@pytest.mark.parametrize("gradient", GRAMIAN_RULES)
@pytest.mark.parametrize("measure", MEASURES, ids=lambda words: words[0])
def test_every_gramian_rule_trains_with_every_source(gradient, measure, tmp_path):
    """After a few epochs the test metrics are far better than chance."""
    methods = ["--loss_method=scaleinvls", f"--gradient_method={gradient}"]  # by equal weights, the sum would hide the others
    words = [*methods, *measure, "train.epochs=6", "balancer.scale=norm", "track=false"]
    final = train(*words, f"output_dir={tmp_path}")
    assert final["left/accuracy"] > 0.18
    assert final["right/accuracy"] > 0.18
    assert final["sum/mae"] < 3.5
    assert final["reconstruction/rmse"] < 0.26


@pytest.mark.parametrize(
    "arguments",
    [
        ["--loss_method=scaleinvls+rlw", "loss.rlw.scale=4"],
        ["--gradient_method=nashmtl", "balancer.every=3", "balancer.smoothing=0.5"],
        ["--gradient_method=pcgrad", "balancer.groups=[[left,right],[sum,reconstruction]]"],
        ["--gradient_method=mgda", "gradient.normalization=loss+"],
        ["--loss_method=famo", "loss.next_batch=true", "train.max_norm=1.0"],
    ],
)
def test_compositions_on_the_command_line(arguments, tmp_path):
    assert train(*arguments, *DIGITS, "track=false", f"output_dir={tmp_path}")


@pytest.fixture(scope="module")
def delta_m(tmp_path_factory):
    """Function from methods to delta_m of a whole run on digits, trained once for each method."""
    folder = tmp_path_factory.mktemp("digits")

    @functools.cache
    def after(methods):
        loss, _, gradient = methods.partition("+")
        words = [f"--loss_method={loss}", *([f"--gradient_method={gradient}"] if gradient else [])]
        return train(*words, "track=false", f"output_dir={folder}")["delta_m"]

    return after


@pytest.mark.slow
@pytest.mark.parametrize("methods", ["uw", "famo", "go4align", "go4align+pcgrad", "scaleinvls+mgda"])
def test_balancers_beat_equal_weights_on_digits(methods, delta_m):
    assert delta_m(methods) < delta_m("ls") - 2


def test_help_lists_every_name(capsys):
    with pytest.raises(SystemExit) as caught:
        trainer.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in (*loss_balancers.names(), *gradient_balancers.names(), "digits"):
        assert name in text


@pytest.mark.slow
def test_ctrl_c_closes_the_run_and_keeps_what_was_logged(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/trainer.py"), "train.epochs=1000", "data.train_pairs=256", "log_every=1"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - background jobs ignore it
    )
    for line in process.stdout:
        if line.startswith("epoch   2"):
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "KILLED" in rest
    assert "Traceback" not in rest
    (run,), client = runs_in(tmp_path / "runs")
    assert run.info.status == "KILLED"
    assert len(client.get_metric_history(run.info.run_id, "val/sum/mae")) >= 2
    assert len(client.get_metric_history(run.info.run_id, "loss/sum")) >= 8
