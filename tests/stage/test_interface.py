import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import balance
from balance import Balancer, compose
from tests.stage.kinds import TASKS, layers, ones

# Parameters of the stage, factors, checkpoints


def balanced_sum(theta):
    return {"a": theta.square().sum(), "b": (3 * theta).square().sum()}


@pytest.mark.parametrize("how", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("gradient", [None, "mgda"])
def test_own_gradients_are_those_of_this_step_also_if_nobody_clears_them(gradient, how):
    histories = []
    for clears in (True, False):
        theta, stage = nn.Parameter(torch.ones(2)), Balancer(("a", "b"), loss="uw", gradient=gradient)
        optimizer = torch.optim.AdamW([theta, *stage.parameters()], lr=1e-2, **({how: True} if how != "plain" else {}))
        history = []
        for _ in range(4):
            theta.grad = None
            if clears:
                optimizer.zero_grad()
            stage.backward(balanced_sum(theta), shared=[theta])
            history.append([p.grad.item() for p in stage.parameters()])
            optimizer.step()
        histories.append(history)
    assert histories[0] == histories[1]


def test_own_gradients_add_up_over_micro_batches_and_not_over_skipped_steps():
    theta, stage = nn.Parameter(torch.ones(2)), Balancer(("a", "b"), loss="uw")
    stage.backward(balanced_sum(theta))
    once = [p.grad.item() for p in stage.parameters()]
    stage.backward(balanced_sum(theta))
    assert [p.grad.item() for p in stage.parameters()] == [2 * g for g in once]
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    losses = balanced_sum(theta)
    stage.backward({"a": losses["a"] * float("nan"), "b": losses["b"]}, scaler=scaler)
    assert all(p.grad.isnan() for p in stage.parameters())
    stage.backward(balanced_sum(theta))
    assert [p.grad.item() for p in stage.parameters()] == once


@pytest.mark.parametrize("gradient", [None, "nashmtl", "pcgrad", "graddrop", "every"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.filterwarnings("ignore:nashmtl ignores")
def test_a_factor_acts_on_grad_alone(gradient, scaled):
    results, reports = [], []
    for factor in (1.0, 0.25):
        model = layers()
        rule = compose.every(2, "mgda", 3) if gradient == "every" else gradient
        stage = Balancer(TASKS, loss="uw", gradient=rule)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
        reports += [stage.backward(model.losses()[1], shared=model.shared(), scaler=scaler, factor=factor) for _ in range(2)]
        results.append([p.grad / factor for p in (*model.parameters(), *stage.parameters())])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(reports[3].loss_weights, reports[1].loss_weights)


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf"), "half", None])
def test_a_factor_must_be_a_positive_number(factor):
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="factor must be a positive number"):
        Balancer(2).backward(theta * 1, factor=factor)


def test_a_factor_does_not_hide_nan():
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="Losses must be finite"):
        Balancer(2).backward(theta * float("nan"), factor=0.5)
    assert theta.grad is None


@pytest.mark.parametrize("loss", balance.loss_balancers.names())
@pytest.mark.filterwarnings("ignore:nashmtl ignores")
def test_state_dicts_hold_tensors_only(loss, tmp_path):
    model = nn.ModuleDict({"stage": Balancer(TASKS, loss=loss, gradient="nashmtl"), "splitter": balance.Splitter(TASKS)})
    state = model.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    torch.save(state, tmp_path / "state.pt")
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "state.safetensors")
    model.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))


def test_a_chain_of_one_is_that_rule():
    one, chain = Balancer(2, loss="famo"), Balancer(2, loss=("famo",))
    chain.load_state_dict(one.state_dict())
    one.load_state_dict(chain.state_dict())


# The interface


def test_options_are_given_by_name():
    with pytest.raises(TypeError):
        Balancer(2, "ls", "mgda", {})
    with pytest.raises(TypeError):
        balance.Splitter(2, "mgda", {})


@pytest.mark.parametrize("gradient", [None, "mgda"])
@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"shared": "not parameters"}, TypeError),
        ({"shared": []}, ValueError),
        ({"features": 3}, ValueError),
        ({"measure": 7}, TypeError),
    ],
)
def test_arguments_that_are_given_are_checked(gradient, given, error):
    t = torch.ones(3, requires_grad=True)
    with pytest.raises(error, match=next(iter(given))):
        Balancer(("a", "b"), gradient=gradient).backward({"a": t.sum(), "b": (t**2).sum()}, **({"shared": [t]} | given))
    assert t.grad is None


def test_repr_says_what_a_stage_is():
    stage = Balancer(("depth", "normals"), gradient="cagrad", gradient_options={"c": 0.9}, scale="norm")
    assert repr(stage) == "Balancer(('depth', 'normals'), loss=ls, gradient=cagrad(c=0.9), scale='norm')"
    chain = Balancer(2, loss=("dwa", "uw"), loss_options={"uw": {"init": 1.0}}, memory="gramian", zero="absent")
    assert repr(chain) == "Balancer(('0', '1'), loss=dwa + uw(init=1.0), gradient=None, zero='absent', memory='gramian')"


def test_a_parameter_that_one_task_reaches_warns_once():
    torch.manual_seed(0)
    trunk, a, b, x = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1), torch.randn(5, 3)
    stage = Balancer(("a", "b"), gradient="mgda")

    def step():
        z = trunk(x).tanh()
        losses = {"a": a(z).square().mean(), "b": b(z).square().mean()}
        stage.backward(losses, shared=[*trunk.parameters(), *b.parameters()])

    with pytest.warns(UserWarning, match=r"shape \(1, 4\) is reached by task 'b' only \(2 such in all\)") as record:
        step()
    assert record[0].filename == __file__
    step()


@pytest.mark.parametrize(
    ("loss", "call"),
    [("famo", "observe"), ("dwa", "end_epoch"), ("igbv1", "end_epoch"), ("igbv2", "end_epoch"), ("coba", "observe_validation")],
)
def test_a_call_that_never_comes_is_asked_for_once(loss, call):
    v = torch.tensor([1.0, 2.0], requires_grad=True)
    for forgets in (True, False):
        stage = Balancer(2, loss=loss)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(450):
                stage.backward(v * 1)
                if not forgets:
                    stage.observe(0.9 * v.detach())
                    stage.end_epoch()
                    stage.observe_validation(1.1 * v.detach())
        assert [call in str(warning.message) for warning in caught] == [True] * forgets
        assert all(warning.filename == __file__ for warning in caught)


@pytest.mark.parametrize("loss", ["uw", "imtl_l", "famo"])
def test_parameters_that_no_optimizer_moves_are_warned_of_once(loss):
    v = torch.tensor([1.0, 2.0], requires_grad=True)
    options = {"optimizer": "user"} if loss == "famo" else {}
    for forgets in (True, False):
        stage = Balancer(2, loss=loss, loss_options=options)
        optimizer = torch.optim.SGD([v, *([] if forgets else stage.parameters())], lr=1e-3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(120):
                optimizer.zero_grad()
                stage.backward(v.square() + 1)
                optimizer.step()
                stage.observe(0.9 * v.detach().square() + 1)
        assert ["balancer.parameters() to the optimizer" in str(w.message) for w in caught] == [True] * forgets
        assert all(warning.filename == __file__ for warning in caught)


def test_a_loss_of_nan_names_the_option_for_tasks_without_labels():
    v = torch.tensor([1.0, torch.nan], requires_grad=True)
    with pytest.raises(ValueError, match=r'give Balancer\(\.\.\., nan="absent"\)'):
        Balancer(2).backward(v * 1)


def test_measure_keeps_the_length_of_the_direction():
    for scale in ("paper", "norm"):
        lengths = []
        for part in (False, True):
            torch.manual_seed(0)
            trunk = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(32, 32), nn.Tanh())])
            heads, x = nn.ModuleList(nn.Linear(32, 1) for _ in TASKS), torch.randn(64, 32)
            z = trunk(x)
            losses = torch.stack([(h(z) - k).square().mean() for k, h in enumerate(heads)])
            rule = compose.every(3, "nashmtl", 3) if part else "nashmtl"
            stage = Balancer(3, gradient=rule, scale=scale)
            extra = {"measure": trunk[10].parameters()} if part else {}
            stage.backward(losses, shared=trunk.parameters(), **extra)
            lengths.append(torch.cat([p.grad.flatten() for p in trunk.parameters()]).norm().item())
            if part:  # and a step that reuses the weights
                trunk.zero_grad()
                z = trunk(x)
                stage.backward(
                    torch.stack([(h(z) - k).square().mean() for k, h in enumerate(heads)]), shared=trunk.parameters()
                )
                lengths.append(torch.cat([p.grad.flatten() for p in trunk.parameters()]).norm().item())
        assert lengths == pytest.approx([lengths[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("gradient", ["mgda", "nashmtl"])
def test_copies_and_pickles_work_after_steps(gradient):
    model = layers()
    stage = Balancer(TASKS, gradient=gradient, engine="batched")
    z, losses = model.losses()
    stage.backward(losses, shared=model.shared(), features=z)
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        z, losses = model.losses()
        other.backward(losses, shared=model.shared(), features=z)


@pytest.mark.parametrize("way", [{}, {"source": "features"}, {"engine": "batched"}], ids=str)
def test_retained_gradients_of_features_are_those_of_the_tasks_once(way):
    if "engine" in way:
        pytest.skip("torch retains no gradient of a batched pass")
    torch.manual_seed(0)
    trunk, heads, x = nn.Linear(6, 8), nn.ModuleList(nn.Linear(8, 1) for _ in TASKS), torch.randn(3, 6)
    results = []
    for balanced in (False, True):
        z = trunk(x)
        z.retain_grad()
        losses = {task: (h(z) - k).square().mean() for k, (task, h) in enumerate(zip(TASKS, heads, strict=True))}
        if balanced:
            Balancer(TASKS, gradient=ones, **way).backward(losses, shared=trunk.parameters(), features=z)
        else:
            sum(losses.values()).backward()
        results.append(z.grad)
    torch.testing.assert_close(*results)


def test_a_step_without_a_gradient_balancer_needs_no_more_memory():
    assert Balancer(TASKS, loss="ls").estimate() == (0, 0, 0, None)
