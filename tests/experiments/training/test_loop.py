import shutil

import numpy as np
import pytest
import torch

from experiments import trainer
from tests.experiments.short_runs import BOTH, DIGITS, finite_metrics, prepare, train


@pytest.mark.parametrize("protocol", ["sound", "paper"])
def test_what_is_clipped(protocol, tiny):
    words = [
        "--gradient_method=pcgrad",
        f"protocol={protocol}",
        "train.report_last=null",
        "train.max_norm=1e-3",
        "model.name=small",
    ]
    run = prepare(*tiny("nyuv2", *words))
    trainer.train_step(run, trainer.build_optimizer(run), next(iter(run.batches)))
    trunk, heads = (
        torch.linalg.vector_norm(torch.cat([value.grad.flatten() for value in part.parameters()]))
        for part in (run.model.trunk, run.model.heads)
    )
    if protocol == "paper":
        assert trunk.item() == pytest.approx(1e-3, rel=1e-3)
        assert heads.item() > 1e-2
    else:
        assert torch.hypot(trunk, heads).item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("protocol", "passes"), [("sound", 1), ("paper", 2)])
def test_the_second_forward_pass_of_famo_leaves_statistics_alone(protocol, passes, tiny):
    run = prepare(*tiny("nyuv2", "--loss_method=famo", f"protocol={protocol}", "model.name=small", "train.report_last=null"))
    trainer.train_step(run, trainer.build_optimizer(run), next(iter(run.batches)))
    (counts,) = {int(value) for key, value in run.model.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts == passes


@pytest.mark.parametrize("name", ["nyuv2", "quantum_chemistry"])
def test_workers_change_nothing(name, tiny):
    alone, helped = (prepare(*tiny(name, "train.epochs=3", f"train.num_workers={workers}")) for workers in (0, 1))
    assert trainer.train(alone) == trainer.train(helped)


def test_a_task_without_a_pixel_is_absent(on_disk, folders, tmp_path):
    damaged = shutil.copytree(folders["nyuv2"], tmp_path / "no_depth")
    for file in (damaged / "train" / "depth").iterdir():
        np.save(file, np.zeros_like(np.load(file)))
    run = prepare(*on_disk("nyuv2", *BOTH, "protocol=paper", "model.name=small", "train.report_last=1", folder=damaged))
    report = trainer.train_step(run, trainer.build_optimizer(run), next(iter(run.batches)))
    assert report.tasks == ("segmentation", "normals")
    finite_metrics(trainer.train(run))


def test_a_network_that_is_shared_as_a_whole(tiny):
    """Its trunk gives a dict."""
    finite_metrics(trainer.train(prepare(*tiny("multimnist", "--gradient_method=pcgrad", "model.shared=everything"))))


@pytest.mark.slow
def test_features_of_each_task(tiny):
    """MTAN, whose trunk gives a tuple, with conflict measured on it."""
    run = prepare(*tiny("cityscapes", *BOTH, "model.name=mtan", "balancer.source=features"))
    report = trainer.train_step(run, trainer.build_optimizer(run), next(iter(run.batches)))
    assert report.gramian.shape == (2, 2)
    assert report.cosines[0, 1] == 0  # each task has a map of its own


def test_weight_decay(tiny):
    run = prepare(*tiny("toy", "--loss_method=uw", "train.weight_decay=0.1"))
    assert [group["weight_decay"] for group in trainer.build_optimizer(run).param_groups] == [0.1, 0]


def test_parameters_of_the_balancer_have_their_own_learning_rate(tmp_path, monkeypatch):
    groups = []
    adam = torch.optim.Adam

    def spy(parameters):
        groups.extend(dict(group) for group in parameters)
        return adam(parameters)

    monkeypatch.setattr(torch.optim, "Adam", spy)
    train("--loss_method=uw", *DIGITS, "track=false", f"output_dir={tmp_path}", "train.lr=0.01")
    assert [group["lr"] for group in groups] == [0.01, 0.025]
    assert len(groups[1]["params"]) == 4
    assert all(log_variance != 0 for log_variance in groups[1]["params"])


@pytest.mark.parametrize("name", ["nyuv2", "multimnist"])
def test_the_paper_reports_the_mean_of_the_last_epochs(name, on_disk, monkeypatch):
    """The test set is the validation set, is evaluated once in every epoch, and selects nothing."""
    found = []
    evaluate = trainer.evaluate

    def kept(run, data):
        found.append(evaluate(run, data))
        return found[-1]

    monkeypatch.setattr(trainer, "evaluate", kept)
    words = ["protocol=paper", "train.epochs=3", "train.report_last=2", *(["model.name=small"] if name == "nyuv2" else [])]
    run = prepare(*on_disk(name, *words))
    final = trainer.train(run)
    assert len(found) == 3
    for metric in run.experiment.metrics():
        assert final[metric] == pytest.approx((found[1][metric] + found[2][metric]) / 2)
    assert torch.load(run.folder / "best.pt")["epoch"] == 3
    assert ("delta_m" in final) == (name == "nyuv2")  # against the published numbers
