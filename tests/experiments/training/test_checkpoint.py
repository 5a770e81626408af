import math

import pytest
import torch

from experiments.training.checkpoint import Selection, checkpoint, symmetric_change
from tests.experiments.short_runs import DIGITS, prepare


def test_symmetric_change_by_hand():
    first = {"a/x": 2.0, "b/y": 0.5}
    assert symmetric_change(first, first, {"a/x"}) == 0
    assert symmetric_change({"a/x": 2.0, "b/y": 0.25}, first, {"a/x"}) == pytest.approx(0.5 * 100 * -0.25 / 0.375)
    assert symmetric_change({"a/x": 4.0, "b/y": 0.5}, first, {"a/x"}) == pytest.approx(0.5 * -100 * 2 / 3)


def test_symmetric_change_is_not_led_by_zero_nor_by_what_is_no_number():
    higher = {"a/x"}
    assert symmetric_change({"a/x": 0.0}, {}, higher) == 200 == symmetric_change({"a/x": 0.0}, {"a/x": 0.3}, higher)
    assert symmetric_change({"b/y": 0.0}, {}, higher) == -200 == symmetric_change({"b/y": 0.0}, {"b/y": 7.0}, higher)
    assert symmetric_change({"a/x": math.nan}, {"a/x": 1.0}, higher) == 200
    assert symmetric_change({"b/y": math.inf}, {"b/y": 1.0}, higher) == 200


def offered(run, epochs):
    chosen = Selection(run)
    scores = [chosen.update(epoch, metrics, {"epoch": epoch}) for epoch, metrics in enumerate(epochs, start=1)]
    assert chosen.state["epoch"] == chosen.epoch == torch.load(run.folder / "best.pt")["epoch"]
    return chosen, scores


def test_the_best_epoch_without_single_task_numbers(tiny):
    run = prepare(*tiny("cityscapes"))
    begin = {"segmentation/miou": 0.0, "segmentation/pixel_accuracy": 0.4, "depth/abs_error": 0.1, "depth/rel_error": 2.0}
    better = begin | {"segmentation/miou": 0.2, "depth/abs_error": 0.05}
    chosen, scores = offered(run, [begin, better, better | {"depth/rel_error": 2.1}, begin])
    assert chosen.epoch == 2
    assert scores[0] > scores[2] > scores[1]
    assert scores[3] == scores[0]  # a metric that began at zero is judged alike at any time
    assert chosen.delta_m(better) is None


def test_the_best_epoch_of_celeba_has_the_largest_mean_f1(tiny):
    run = prepare(*tiny("celeba"))
    zeros = dict.fromkeys(run.problem.metrics(), 0.0)
    chosen, scores = offered(run, [zeros, zeros | {"bald/f1": 0.8}, zeros | {"bald/f1": 0.5, "young/f1": 0.4}])
    assert chosen.epoch == 3
    assert scores == pytest.approx([0, -0.8 / 40, -0.9 / 40])
    alone = prepare(*tiny("celeba", "--loss_method=stl", "loss.main_task=4"))
    assert offered(alone, [zeros, zeros | {"bald/f1": 0.8}, zeros | {"bald/f1": 0.5, "young/f1": 0.9}])[0].epoch == 2


def test_the_best_epoch_on_validation_is_kept(tmp_path):
    run = prepare("track=false", *DIGITS, f"output_dir={tmp_path}")
    selection = Selection(run)
    good = {"left/accuracy": 0.9, "right/accuracy": 0.9, "sum/mae": 1.0, "reconstruction/rmse": 0.1}
    bias = run.model.trunk[0].bias
    for epoch, metrics in enumerate([good | {"sum/mae": 2.0}, good, good | {"left/accuracy": 0.5}], start=1):
        torch.nn.init.constant_(bias, epoch)
        selection.update(epoch, metrics, checkpoint(run, epoch))
    assert selection.epoch == 2
    assert (selection.state["model"]["trunk.0.bias"] == 2).all()


def test_single_task_learning_is_judged_by_its_task(tmp_path):
    arguments = ["--loss_method=stl", "loss.main_task=2", "track=false", *DIGITS, f"output_dir={tmp_path}"]
    run = prepare(*arguments)
    selection = Selection(run)
    metrics = {"left/accuracy": 0.1, "right/accuracy": 0.1, "reconstruction/rmse": 9.0}
    assert selection.delta_m(metrics | {"sum/mae": selection.baselines["sum/mae"]}) == pytest.approx(0)


def test_the_last_checkpoint_holds_what_goes_on(demo):
    folder, _ = demo
    (file,) = (folder / "runs" / "digits").glob("*/last.pt")
    last = torch.load(file)
    assert last["epoch"] == 2
    assert {"model", "balancer", "optimizer", "schedule", "selection", "random"} < set(last)
    assert all(state["step"] == 8 for state in last["optimizer"]["state"].values())
