"""Mistakes in the command: exit code 2, a message, no traceback, and nothing left behind."""

import subprocess
import sys

import pytest

from experiments import trainer
from tests.experiments.short_runs import DENSE, DIGITS, ROOT, refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss_method=go4aling"], "Unknown loss balancer 'go4aling'. Did you mean 'go4align'?"),
        (["--gradient_method=mdga"], "Unknown gradient balancer 'mdga'. Did you mean 'mgda'?"),
        (["--experiment=digit"], "Unknown experiment 'digit'. Did you mean 'digits'?"),
        (["train.epoch=3"], "Unknown key 'train.epoch'. Did you mean 'train.epochs'?"),
        (["train.epochs=three"], "does not fit 'train.epochs'"),
        (["--seed=one"], "does not fit 'seed'"),
        (["train.epochs=0"], "train.epochs must be at least 1"),
        (["train.lr=-1.0"], "train.lr must be positive"),
        (["--loss_method=go4align", "loss.num_groups=many"], "does not fit 'loss.num_groups'"),
        (["--loss_method=go4align", "loss.num_groups=0"], "must be at least 1"),
        (["--loss_method=uw", "loss.num_groups=2"], "Unknown key 'loss.num_groups'"),
        (["--loss_method=stl", "loss.main_task=9"], "main_task of 'stl' must be in 0..3"),
        (["device=gpu"], "Device 'gpu' is not available"),
        (["balancer.every=2"], "need a gradient method"),
        (["--gradient_method=mgda", "balancer.groups=[[left],[rihgt]]"], "Did you mean 'right'?"),
        (["--gradient_method=mgda", "balancer.groups=[[left]]"], "exactly one group"),
        (["--loss_method=scaleinvls+famo"], "must come first"),
        (["--loss_method=scaleinvls+rwl"], "Did you mean 'rlw'?"),
        (["--loss_method=scaleinvls,rlw"], "in a chain, write scaleinvls+rlw"),
        (["--gradient_method=graddrop", "balancer.every=2"], "sees the Jacobian"),
        (["train.schedule=linear"], "does not fit 'train.schedule'"),
        (["output_dir=/dev/null/runs"], "cannot write to /dev/null/runs"),
        (["data.train_pairs=0"], "data.train_pairs must be at least 1"),
        (["--los_method=uw"], "unrecognized arguments: --los_method=uw"),
        (["epochs"], "must read key=value"),
    ],
)
def test_mistakes_answer_with_exit_code_2_and_no_traceback(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        trainer.main([*arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_mistake_on_the_real_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/trainer.py"), "--loss_method=famoo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Did you mean 'famo'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_tracking_server_that_cannot_be_used_costs_no_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://server")
    with pytest.raises(SystemExit) as caught:
        trainer.main([*DIGITS, f"output_dir={tmp_path}"])
    assert caught.value.code == 2
    assert "MLflow at nonsense://server cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["protocol=paper"], "protocol must be sound for 'digits'"),
        (["protocol=papers"], "does not fit 'protocol'"),
        (["--experiment=nyuv2", "data.protocol=paper"], "data.protocol must equal protocol, but got paper"),
        (["--experiment=nyuv2", *DENSE, "model.name=mtann"], "model.name must be one of small, segnet, mtan, but got mtann"),
        (["--experiment=nyuv2", "modell.name=mtan"], "Unknown key 'modell'"),
        (["--experiment=nyuv2", "data.source=files"], "must be the folder with train and val in it"),
        (["--experiment=multimnist", "protocol=paper"], "got paper. Set data.path=FOLDER for MNIST"),
        (["--experiment=multimnist", "data.source=mnist"], "must be the folder with the four files of MNIST"),
        (["data.path=somewhere"], "Unknown key 'data.path'"),
        (["train.num_workers=1"], "train.num_workers must be 0 for this data"),
        (["train.max_norm=0"], "train.max_norm must be positive, but got 0.0. null turns clipping off."),
        (["train.num_workers=-1"], "train.num_workers must not be negative"),
        (["train.eval_batch_size=0"], "train.eval_batch_size must be at least 1"),
        (["train.factor=1"], "train.factor must be above 0 and below 1"),
        (["train.precision=fp8"], "does not fit 'train.precision'"),
        (["train.optimizer=adm"], "does not fit 'train.optimizer'"),
        (["train.optimizer=sgd", "optimizer.eps=1e-7"], "Unknown key 'optimizer.eps'"),
        (["optimizer.momentum=0.9"], "Unknown key 'optimizer.momentum'"),
        (["train.optimizer=sgd", "optimizer.momentum=1"], "optimizer.momentum must be at least 0 and below 1"),
        (["train.optimizer=sgd", "optimizer.nesterov=true"], "optimizer.nesterov needs momentum and no dampening"),
        (["optimizer.betas=[0.9]"], "optimizer.betas must be two numbers"),
        (["train.optimizer=adamw", "optimizer.betas=[0.9,1.5]"], "optimizer.betas must be at least 0 and below 1"),
        (["train.report_last=31"], "train.report_last must be at most train.epochs=30"),
    ],
)
def test_mistakes_in_the_command(words, message, capsys, tmp_path):
    assert message in refused([*words, f"output_dir={tmp_path}/runs"], capsys, tmp_path)


def test_a_library_that_is_not_installed(capsys, tmp_path, monkeypatch):
    for module in [module for module in sys.modules if module.startswith("experiments.problems.quantum_chemistry")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    words = ["--experiment=quantum_chemistry", f"output_dir={tmp_path}/runs"]
    assert "pip install -e . --group graph" in refused(words, capsys, tmp_path)
