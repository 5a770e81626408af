import pytest
import torch
from rich.console import Console

from experiments.training import run
from tests.experiments.short_runs import DIGITS, configure, prepare


def test_the_protocol_reaches_losses_and_metrics(tiny):
    sound, paper = (
        run.build(configure(*tiny("nyuv2", f"protocol={protocol}", "model.name=small", "train.report_last=null")))
        for protocol in ("sound", "paper")
    )
    assert type(sound.problem.metrics()["depth/abs_error"]).__name__ == "PixelMean"
    assert type(paper.problem.metrics()["depth/abs_error"]).__name__ == "BatchMean"
    image, label, depth, _ = sound.data.train[[0]]
    normal = torch.tensor([0.6, -0.6, 0.0])[:, None, None].expand(1, 3, *label.shape[1:])  # counts in the one, not in the other
    outputs = sound.model.eval()(image)
    assert "normals" in sound.problem.losses(outputs, (image, label, depth, normal))
    assert "normals" not in paper.problem.losses(outputs, (image, label, depth, normal))
    assert paper.data.test is paper.data.validation
    assert sound.data.test is not sound.data.validation


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gradient_method=mgda", "balancer.measure=[trunk.9]"], "Unknown name in balancer.measure 'trunk.9'"),
        (["balancer.measure=['*']"], "balancer.measure needs a gradient method that returns weights, but got None"),
        (["--gradient_method=graddrop", "balancer.measure=['*']"], "returns weights, but got graddrop"),
        (["--gradient_method=mgda", "balancer.measure=['*']", "balancer.source=features"], "needs balancer.source=parameters"),
        (["--gradient_method=graddrop", "balancer.memory=gramian"], "memory='gramian' does not keep"),
    ],
)
def test_choices_of_the_engine_that_do_not_fit(words, message, tmp_path):
    config = configure(*words, *DIGITS, f"output_dir={tmp_path}/runs")
    with pytest.raises(ValueError, match=message):
        run.prepare(config, Console(quiet=True))
    assert not (tmp_path / "runs").exists()


def test_compositions_reach_the_stage(tmp_path):
    words = ["--loss_method=scaleinvls+uw", "--gradient_method=pcgrad", "balancer.every=3", "loss.uw.init=0.5", "track=false"]
    words += ["balancer.groups=[[left,right],[sum,reconstruction]]", "gradient.order=fixed", f"output_dir={tmp_path}", *DIGITS]
    balancer = prepare(*words).balancer
    assert balancer.loss_balancer.rule.rules[1].rule.log_variances[0].item() == 0.5
    assert balancer.gradient_balancer.rule.n == 3
    assert balancer.gradient_balancer.rule.rule.rule.membership.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert balancer.gradient_balancer.rule.rule.rule.rule.rule.order == "fixed"
    assert balancer.heads == "unweighted"
