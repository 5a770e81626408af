import shutil

import numpy as np
import pytest
import torch

from experiments.training import loop
from experiments.training.step import build_optimizer, train_step
from tests.experiments.short_runs import BOTH, finite_metrics, prepare


@pytest.mark.parametrize("name", ["nyuv2", "quantum_chemistry"])
def test_workers_change_nothing(name, tiny):
    alone, helped = (prepare(*tiny(name, "train.epochs=3", f"train.num_workers={workers}")) for workers in (0, 1))
    assert loop.train(alone) == loop.train(helped)


def test_a_task_without_a_pixel_is_absent(on_disk, folders, tmp_path):
    damaged = shutil.copytree(folders["nyuv2"], tmp_path / "no_depth")
    for file in (damaged / "train" / "depth").iterdir():
        np.save(file, np.zeros_like(np.load(file)))
    run = prepare(*on_disk("nyuv2", *BOTH, "protocol=paper", "model.name=small", "train.report_last=1", folder=damaged))
    report = train_step(run, build_optimizer(run), next(iter(run.batches)))
    assert report.tasks == ("segmentation", "normals")
    finite_metrics(loop.train(run))


def test_a_network_that_is_shared_as_a_whole(tiny):
    """Its trunk gives a dict."""
    finite_metrics(loop.train(prepare(*tiny("multimnist", "--gradient_method=pcgrad", "model.shared=everything"))))


@pytest.mark.parametrize("name", ["nyuv2", "multimnist"])
def test_the_paper_reports_the_mean_of_the_last_epochs(name, on_disk, monkeypatch):
    """The test set is the validation set, is evaluated once in every epoch, and selects nothing."""
    evaluations = []
    evaluate = loop.evaluate

    def recorded(run, data):
        evaluations.append(evaluate(run, data))
        return evaluations[-1]

    monkeypatch.setattr(loop, "evaluate", recorded)
    words = ["protocol=paper", "train.epochs=3", "train.report_last=2", *(["model.name=small"] if name == "nyuv2" else [])]
    run = prepare(*on_disk(name, *words))
    final = loop.train(run)
    assert len(evaluations) == 3
    for metric in run.problem.metrics():
        assert final[metric] == pytest.approx((evaluations[1][metric] + evaluations[2][metric]) / 2)
    assert torch.load(run.folder / "best.pt")["epoch"] == 3
    assert ("delta_m" in final) == (name == "nyuv2")  # against the published numbers
