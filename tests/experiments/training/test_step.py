from dataclasses import replace

import pytest
import torch

from experiments.training import loop
from experiments.training.step import build_optimizer, observe_validation, train_step
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
def test_validation_batches_go_round_the_data(tmp_path):
    words = ["--loss_method=coba", *DIGITS, "train.batch_size=64", "train.validation_interval=3", f"output_dir={tmp_path}"]
    run = prepare(*words)
    rule, read = run.balancer.loss_balancer.rule, []

    class Watched:
        def __len__(self):
            return len(run.data.validation)

        def __getitem__(self, indices):
            read.append(indices)
            return run.data.validation[indices]

    watched = run._replace(data=run.data._replace(validation=Watched()))
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.model.train()
    for step in range(7):
        observe_validation(watched, step)
    assert read == [[*range(64)], [*range(64, 100), *range(28)], [*range(28, 92)]]
    assert rule.observations == 2  # after the first one
    run.model.eval()
    losses = run.problem.losses(run.model(run.data.validation[read[0]][0]), run.data.validation[read[0]])
    torch.testing.assert_close(rule.first, torch.stack(list(losses.values())).detach().double())
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())


def test_other_methods_read_no_validation_batches(tmp_path):
    run = prepare("--loss_method=uw", *DIGITS, f"output_dir={tmp_path}")
    observe_validation(run._replace(data=run.data._replace(validation=None)), 0)


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

    def spy(parameters, **options):
        groups.extend(dict(group) for group in parameters)
        return adam(parameters, **options)

    monkeypatch.setattr(torch.optim, "Adam", spy)
    train("--loss_method=uw", *DIGITS, "track=false", f"output_dir={tmp_path}", "train.lr=0.01")
    assert [group["lr"] for group in groups] == [0.01, 0.025]
    assert len(groups[1]["params"]) == 4
    assert all(log_variance != 0 for log_variance in groups[1]["params"])


@pytest.mark.parametrize(
    ("words", "kind", "options"),
    [
        ([], torch.optim.Adam, {"betas": [0.9, 0.999], "eps": 1e-8}),
        (["train.optimizer=adam", "optimizer.betas=[0.8,0.9]"], torch.optim.Adam, {"betas": [0.8, 0.9], "eps": 1e-8}),
        (["train.optimizer=adamw", "optimizer.eps=1e-3"], torch.optim.AdamW, {"betas": [0.9, 0.999], "eps": 1e-3}),
        (
            ["train.optimizer=sgd", "optimizer.momentum=0.9", "optimizer.nesterov=true"],
            torch.optim.SGD,
            {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
        ),
    ],
)
def test_optimizers_and_their_options(words, kind, options, tiny):
    """A step changes parameters exactly as the optimizer of torch with these options does."""
    run = prepare(*tiny("toy", "--loss_method=uw", "train.weight_decay=0.1", "train.lr=0.01", *words))
    twin = [parameter.detach().clone().requires_grad_() for parameter in (*run.model.parameters(), *run.balancer.parameters())]
    count = len([*run.model.parameters()])
    groups = [
        {"params": twin[:count], "lr": 0.01, "weight_decay": 0.1},
        {"params": twin[count:], "lr": 0.025, "weight_decay": 0.0},
    ]
    expected, optimizer = kind(groups, **options), build_optimizer(run)
    for _ in range(3):
        train_step(run, optimizer, next(iter(run.batches)))
        for parameter, copy in zip((*run.model.parameters(), *run.balancer.parameters()), twin, strict=True):
            copy.grad = parameter.grad.clone()
        expected.step()
    for parameter, copy in zip((*run.model.parameters(), *run.balancer.parameters()), twin, strict=True):
        assert torch.equal(parameter, copy)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("words", [["--loss_method=uw"], ["--loss_method=famo", "--gradient_method=pcgrad"]])
def test_precision_of_a_step(precision, dtype, words, tiny):
    """Forward passes have the precision, gradients equal the fp32 gradients to rounding, and rules see unscaled losses."""
    run, exact = (prepare(*tiny("digits", *words, f"train.precision={name}")) for name in (precision, "fp32"))
    run = run._replace(scaler=torch.amp.GradScaler("cpu", init_scale=64.0, enabled=precision == "fp16"))
    dtypes = []
    run.model.trunk.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    batch = next(iter(run.batches))
    reports = []
    for each in (run, exact):
        optimizer = build_optimizer(each)
        optimizer.step = lambda *_: None  # gradients are compared before any update
        reports.append(train_step(each, optimizer, batch))
    assert dtypes == [dtype] * (2 if "--loss_method=famo" in words else 1)
    torch.testing.assert_close(reports[0].losses, reports[1].losses, rtol=2e-2, atol=1e-2)
    for p, q in zip(run.model.parameters(), exact.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.1, atol=0.1 * q.grad.abs().max().item())


def test_an_overflow_is_skipped(tiny):
    """The scale is halved until gradients are finite; no parameter, rule or state of the optimizer changes before."""
    run = prepare(
        *tiny("digits", "--loss_method=famo", "--gradient_method=pcgrad", "train.precision=fp16", "train.max_norm=0.01")
    )
    run = run._replace(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**30))
    optimizer, batch = build_optimizer(run), next(iter(run.batches))
    before = {key: value.clone() for key, value in (run.model.state_dict() | run.balancer.state_dict()).items()}
    train_step(run, optimizer, batch)
    assert run.scaler.get_scale() == 2.0**29
    assert not optimizer.state
    for key, value in (run.model.state_dict() | run.balancer.state_dict()).items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
    while not optimizer.state:
        train_step(run, optimizer, batch)
    assert 1 < run.scaler.get_scale() < 2.0**29
    assert not torch.equal(run.model.state_dict()["trunk.0.weight"], before["trunk.0.weight"])
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    assert norm.item() == pytest.approx(0.01, rel=1e-3)  # of the gradients without their scale


def test_a_whole_run_with_skipped_steps(tiny):
    """A scale of 2**16 overflows at the first steps of digits."""
    final = loop.train(prepare(*tiny("digits", "train.precision=fp16", "train.lr=0.01", "train.optimizer=sgd")))
    assert finite_metrics(final)


def halves(batch):
    """Micro-batches of unequal size, each with all tasks."""
    yield tuple(part[:5] for part in batch)
    yield tuple(part[5:] for part in batch)


@pytest.mark.parametrize("methods", [["--gradient_method=nashmtl"], ["--loss_method=famo"]])
def test_micro_batches_make_the_step_of_the_whole_batch(methods, tiny):
    """Losses of the same task in several micro-batches are averaged by their numbers of samples, also after the step."""
    runs = []
    for micro_batches in (None, halves):
        run = prepare(*tiny("digits", *methods, "train.optimizer=sgd", "data.noise=0"))
        run = run._replace(problem=replace(run.problem, micro_batches=micro_batches), model=run.model.double())
        optimizer, (canvas, *rest) = build_optimizer(run), next(iter(run.batches))
        report = train_step(run, optimizer, (canvas.double(), *rest))
        runs.append([report.losses.double(), *run.model.parameters(), *run.balancer.state_dict().values()])
    for whole, separate in zip(*runs, strict=True):
        torch.testing.assert_close(separate, whole, rtol=1e-6, atol=1e-8, equal_nan=True)
