import pytest
import torch

from experiments.training.step import build_optimizer, train_step
from tests.experiments.short_runs import BOTH, DIGITS, prepare, train


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
    train_step(run, build_optimizer(run), next(iter(run.batches)))
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
    train_step(run, build_optimizer(run), next(iter(run.batches)))
    (counts,) = {int(value) for key, value in run.model.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts == passes


@pytest.mark.slow
def test_features_of_each_task(tiny):
    """MTAN, whose trunk gives a tuple, with conflict measured on it."""
    run = prepare(*tiny("cityscapes", *BOTH, "model.name=mtan", "balancer.source=features"))
    report = train_step(run, build_optimizer(run), next(iter(run.batches)))
    assert report.gramian.shape == (2, 2)
    assert report.cosines[0, 1] == 0  # each task has its features


def test_weight_decay(tiny):
    run = prepare(*tiny("toy", "--loss_method=uw", "train.weight_decay=0.1"))
    assert [group["weight_decay"] for group in build_optimizer(run).param_groups] == [0.1, 0]


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
