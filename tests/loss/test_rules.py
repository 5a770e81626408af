"""Properties that all loss balancers share: types, devices, default settings of torch, and failures."""

import copy

import pytest
import torch

from balance import loss_balancers
from tests.loss.defaults import CONTEXTS
from tests.stage.three_tasks import assert_same_state


@pytest.mark.parametrize("name", loss_balancers.names())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_of_every_dtype_give_the_float64_result_in_their_dtype(name, dtype):
    L = torch.tensor([0.0625, 1.0, 24.0], dtype=dtype).requires_grad_()  # exact in every dtype
    weighted = loss_balancers.build(name, num_tasks=3)(L)
    gradient = torch.autograd.grad(weighted.sum(), L)[0]
    assert weighted.dtype == gradient.dtype == dtype
    exact = L.detach().double().requires_grad_()
    expected = loss_balancers.build(name, num_tasks=3)(exact)
    tolerances = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(weighted.double(), expected, **tolerances)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected.sum(), exact)[0], **tolerances)


def test_tiny_losses_and_bounds_do_not_underflow_in_half_precision():
    L = torch.tensor([0.0, 1.0], dtype=torch.float16)  # where 1e-8 is zero
    assert loss_balancers.build("famo", num_tasks=2)(L).isfinite().all()
    assert loss_balancers.build("scaleinvls", min_losses=[-1e-8, 0.0])(L).isfinite().all()
    L = torch.tensor([1e-6, 1.0, 1e4], dtype=torch.float16)  # weights beyond the range of float16
    assert loss_balancers.build("go4align", num_tasks=3, num_groups=3)(L).isfinite().all()


SMALL = {
    "coba": {"warmup": 5, "history": 8},
    "dwa": {"mode": "epoch"},
    "igbv2": {"buffer_size": 64},
    "linear_schedule": {"start": [0.0, 1.0, 2.0], "steps": 40},
    "relobralo": {"rho": 0.5},
}


def run(rule, sequence, per_epoch=8):
    """Weighted losses at each row. The rule observes each row scaled by 0.9, and ends epochs."""
    weighted_losses = []
    for step, row in enumerate(sequence):
        weighted_losses.append(rule(row))
        if getattr(rule, "needs_observation", False):
            rule.observe(0.9 * row)
        if getattr(rule, "needs_validation", False):
            rule.observe_validation(1.1 * row.flip(0))
        if hasattr(rule, "end_epoch") and step % per_epoch == per_epoch - 1:
            rule.end_epoch(row)
    return torch.stack(weighted_losses)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", loss_balancers.names())
def test_default_device_and_default_dtype_change_nothing(name, context):
    """Long enough for igbv2 to train (step 50) and to act (step 40). A module continues from its state_dict."""
    sequence = 0.5 + torch.rand(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = loss_balancers.build(name, num_tasks=3, **SMALL.get(name, {}))
    expected = run(rule, sequence)
    expected_end = run(rule, sequence[:10])
    with CONTEXTS[context]():
        rule, other = (loss_balancers.build(name, num_tasks=3, **SMALL.get(name, {})) for _ in range(2))
        assert torch.equal(run(rule, sequence), expected)
        if isinstance(rule, torch.nn.Module):
            other.load_state_dict(rule.state_dict())
            assert {value.device.type for value in other.state_dict().values()} <= {"cpu"}
            assert_same_state(other.state_dict(), rule.state_dict())
            rule = other
        assert torch.equal(run(rule, sequence[:10]), expected_end)


@pytest.mark.parametrize("options", [{"name": "dwa", "mode": "window", "window": 2}, {"name": "famo", "next_batch": True}])
def test_default_device_changes_nothing_in_other_modes(options):
    sequence = 0.5 + torch.rand(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = run(loss_balancers.build(**options, num_tasks=3), sequence)
    with torch.device("meta"):
        assert torch.equal(run(loss_balancers.build(**options, num_tasks=3), sequence), expected)


@pytest.mark.parametrize("name", ["scaleinvls", "famo"])
def test_default_device_changes_nothing_of_bounds(name):
    L, present = torch.tensor([2.0, 3.0], dtype=torch.float64), torch.tensor([0, 2])
    expected = loss_balancers.build(name, num_tasks=3, min_losses=[1.0, 0.0, -1.0])(L, present=present)
    with torch.device("meta"):
        weighted = loss_balancers.build(name, num_tasks=3, min_losses=[1.0, 0.0, -1.0])(L, present=present)
    assert torch.equal(weighted, expected)


def test_rules_that_update_once_per_epoch_say_so():
    built = {name: loss_balancers.build(name, num_tasks=2) for name in loss_balancers.names()}
    assert {name for name, rule in built.items() if getattr(rule, "needs_epochs", False)} == {"dwa", "igbv1", "igbv2", "stch"}
    assert not loss_balancers.build("stch", num_tasks=2, form="plain").needs_epochs
    assert not loss_balancers.build("dwa", num_tasks=2, mode="window").needs_epochs


@pytest.mark.parametrize("name", ["scaleinvls", "gls", "go4align", "igbv1", "igbv2", "relobralo", "resnorm", "stch"])
def test_a_loss_of_zero_is_explained_by_a_task_without_labels(name):
    cause = r'no labels in this batch\. Leave the task out of the dict, or set zero="absent"\. Otherwise (add|give)'
    rule = loss_balancers.build(name, num_tasks=2)
    with pytest.raises(ValueError, match=rf"Loss of task '1' is 0, but must be above 0, because '{name}' .*{cause}"):
        rule(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"Loss of task '0' is -1, [^.]*\. (Add|Give)"):
        rule(torch.tensor([-1.0, 0.0]))


DEFAULTS = {
    "dwa": {"temperature": 2.0, "mode": "epoch", "window": 25},
    "coba": {"tau": 5.0, "history": 200, "warmup": 100},
    "constant": {"weights": None},
    "cosmos": {"preference": None, "penalty": 1.0},
    "famo": {"gamma": None, "lr": None, "min_losses": None, "next_batch": False, "optimizer": "inner"},
    "gls": {},
    "go4align": {"num_groups": 2, "step_size": 1e-4, "grouping": "kmeans", "relative_step": False},
    "igbv1": {"base_epoch": 1},
    "igbv2": {"base_epoch": 1, "sac_lr": 3e-4, "buffer_size": 10_000, "official": False, "seed": 0},
    "imtl_l": {"init": 0.0},
    "linear_schedule": {"start": None, "end": None, "steps": 1000},
    "ls": {},
    "minimax": {"lr": 0.005, "ascent": "adam", "every": 1, "init": 1.0},
    "pbi": {"preference": None, "theta": 5.0, "reference": None},
    "relobralo": {"alpha": 0.999, "temperature": 1.0, "rho": 0.999, "seed": 0},
    "resnorm": {"alpha": 1.0, "lr": 1e-3},
    "rlw": {"scale": 1.0, "seed": 0},
    "scaleinvls": {"min_losses": None},
    "softadapt": {"beta": 0.1, "variant": "plain", "window": 2, "point": "newest"},
    "stch": {"mu": 1.0, "warmup_epochs": 4, "form": None, "preference": None, "reference": None},
    "stl": {"main_task": 0},
    "tchebycheff": {"preference": None, "reference": None, "rho": 0.0, "form": "augmented"},
    "uw": {"init": 0.0},
}


def test_the_defaults_of_every_rule_are_listed():
    assert set(DEFAULTS) == set(loss_balancers.names())


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_as_documented(name):
    assert {option: p.default for option, p in loss_balancers.options(name).items()} == DEFAULTS[name]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coba", {"tau": -1.0}, "tau of 'coba' must be a finite number, not negative"),
        ("coba", {"history": 1}, "history of 'coba' must be at least 2"),
        ("coba", {"warmup": 1}, "warmup of 'coba' must be at least 2"),
        ("constant", {"weights": [1.0]}, "weights of 'constant' must have one number for each of 2 tasks"),
        ("constant", {"weights": [1.0, -1.0]}, "weights of 'constant' must not be negative, nor all zero"),
        ("constant", {"weights": [0.0, 0.0]}, "weights of 'constant' must not be negative, nor all zero"),
        ("constant", {"weights": [1.0, float("nan")]}, "weights of 'constant' must be finite numbers"),
        ("cosmos", {"penalty": -1.0}, "penalty of 'cosmos' must be a finite number, not negative"),
        ("cosmos", {"preference": [1.0, -1.0]}, "preference of 'cosmos' must not be negative"),
        ("dwa", {"temperature": 0.0}, "temperature of 'dwa' must be positive"),
        ("dwa", {"window": 0}, "window of 'dwa' must be at least 1"),
        ("famo", {"gamma": -0.5}, "gamma of 'famo' must not be negative"),
        ("famo", {"lr": 0.0}, "lr of 'famo' must be positive"),
        ("famo", {"lr": -0.5}, "lr of 'famo' must be positive"),
        ("famo", {"min_losses": [0.0]}, "one number for each of 2 tasks"),
        ("famo", {"gamma": 0.0, "optimizer": "user"}, "gamma and lr of 'famo' must be None with optimizer='user'"),
        ("famo", {"lr": 0.1, "optimizer": "user"}, "gamma and lr of 'famo' must be None with optimizer='user'"),
        ("go4align", {"num_groups": 0}, "num_groups of 'go4align' must be at least 1"),
        ("go4align", {"step_size": -0.5}, "step_size of 'go4align' must not be negative"),
        ("igbv2", {"sac_lr": -0.5}, "sac_lr of 'igbv2' must be positive"),
        ("linear_schedule", {"steps": 0}, "steps of 'linear_schedule' must be at least 1"),
        ("linear_schedule", {"end": [1.0]}, "end of 'linear_schedule' must have one number for each of 2 tasks"),
        ("linear_schedule", {"start": [0.0, 0.0]}, "start of 'linear_schedule' must not be negative, nor all zero"),
        ("minimax", {"lr": 0.0}, "lr of 'minimax' must be positive"),
        ("minimax", {"init": 0.0}, "init of 'minimax' must be positive"),
        ("minimax", {"every": 0}, "every of 'minimax' must be at least 1"),
        ("pbi", {"theta": -1.0}, "theta of 'pbi' must be a finite number, not negative"),
        ("pbi", {"reference": [0.0]}, "reference of 'pbi' must have one number for each of 2 tasks"),
        ("relobralo", {"alpha": 1.5}, r"alpha of 'relobralo' must be in 0\.\.1"),
        ("relobralo", {"rho": -0.5}, r"rho of 'relobralo' must be in 0\.\.1"),
        ("relobralo", {"temperature": 0.0}, "temperature of 'relobralo' must be positive"),
        ("resnorm", {"alpha": -1.0}, "alpha of 'resnorm' must be a finite number, not negative"),
        ("resnorm", {"lr": 0.0}, "lr of 'resnorm' must be positive"),
        ("rlw", {"scale": 0.0}, "scale of 'rlw' must be positive"),
        ("softadapt", {"beta": float("inf")}, "beta of 'softadapt' must be a finite number"),
        ("softadapt", {"window": 1}, "window of 'softadapt' must be at least 2"),
        ("stch", {"mu": 0.0}, "mu of 'stch' must be positive"),
        ("stch", {"warmup_epochs": -1}, "warmup_epochs of 'stch' must not be negative"),
        ("stch", {"form": "log", "preference": [1.0, 1.0]}, "preference and reference of 'stch' must be None with form='log'"),
        ("stch", {"form": "log", "reference": [0.0, 0.0]}, "preference and reference of 'stch' must be None with form='log'"),
        ("tchebycheff", {"rho": -0.1}, "rho of 'tchebycheff' must be a finite number, not negative"),
        ("stl", {"main_task": 2}, r"main_task of 'stl' must be in 0\.\.1"),
        ("stl", {"main_task": -1}, r"main_task of 'stl' must be in 0\.\.1"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        loss_balancers.build(name, num_tasks=2, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("coba", {"tau": 0.0, "history": 2, "warmup": 2}),
        ("constant", {"weights": [0.0, 2.0]}),
        ("cosmos", {"penalty": 0.0, "preference": [0.0, 1.0]}),
        ("dwa", {"window": 1, "temperature": 0.5}),
        ("famo", {"gamma": 0.0, "lr": 0.5}),
        ("go4align", {"num_groups": 1, "step_size": 0.0}),
        ("igbv1", {"base_epoch": 0}),
        ("igbv2", {"base_epoch": 0, "buffer_size": 1, "sac_lr": 0.5}),
        ("linear_schedule", {"steps": 1, "start": [0.0, 1.0]}),
        ("minimax", {"every": 1, "lr": 10.0}),
        ("pbi", {"theta": 0.0, "preference": [0.0, 1.0], "reference": [-1.0, 5.0]}),
        ("relobralo", {"alpha": 0.0, "rho": 0.0}),
        ("relobralo", {"alpha": 1.0, "rho": 1.0}),
        ("resnorm", {"alpha": 0.0, "lr": 5.0}),
        ("rlw", {"scale": 0.5}),
        ("softadapt", {"window": 2, "beta": 0.0}),
        ("stch", {"warmup_epochs": 0, "mu": 1e-6}),
        ("stch", {"form": "plain", "mu": 1e-300, "reference": [-1.0, 5.0], "preference": [0.0, 1.0]}),
        ("tchebycheff", {"rho": 0.0, "preference": [0.0, 1.0]}),
        ("stl", {"main_task": 1}),
    ],
)
def test_options_at_the_ends_of_their_ranges(name, options):
    assert loss_balancers.build(name, num_tasks=2, **options)(torch.ones(2)).isfinite().all()


def failing(rule):
    """Calls that raise: a wrong number of losses, and losses outside the rule's domain."""
    kind = type(rule).__name__
    if kind != "RandomLossWeighting":  # which takes any number of losses
        yield lambda: rule(torch.ones(4))
    if kind in ("FAMO", "GO4Align", "IGBv1", "IGBv2", "Minimax", "ReLoBRaLo", "ResidualNormalization", "SmoothTchebycheff"):
        yield lambda: rule(torch.tensor([1.0, 2.0, -3.0]))
        yield lambda: rule(torch.tensor([1.0, torch.nan, 3.0]))
    if kind == "CoBa":
        yield lambda: rule.observe_validation(torch.tensor([1.0, 2.0, 0.0]))
        yield lambda: rule.observe_validation(torch.tensor([1.0, torch.nan, 3.0]))
        yield lambda: rule.observe_validation(torch.ones(4))
    if kind in ("IGBv1", "IGBv2", "SmoothTchebycheff"):
        yield lambda: rule.end_epoch(torch.tensor([1.0, 0.0, 1.0]))
    if getattr(rule, "needs_observation", False):
        rule(torch.ones(3))  # losses that remain to be observed
        yield lambda: rule.observe(torch.tensor([1.0, 2.0, -3.0]))


STATEFUL = [
    {"name": "rlw"},
    {"name": "uw"},
    {"name": "imtl_l"},
    {"name": "linear_schedule", "end": [1.0, 2.0, 3.0], "steps": 30},
    {"name": "coba", "warmup": 3, "history": 5},
    {"name": "minimax"},
    {"name": "relobralo", "rho": 0.5},
    {"name": "resnorm"},
    {"name": "softadapt"},
    {"name": "stch", "warmup_epochs": 0},
    {"name": "famo", "optimizer": "user"},
    {"name": "dwa"},
    {"name": "dwa", "mode": "window", "window": 2},
    {"name": "famo"},
    {"name": "famo", "next_batch": True},
    {"name": "go4align"},
    {"name": "igbv1", "base_epoch": 0},
    {"name": "igbv2", "base_epoch": 0, "buffer_size": 64},
]


def test_every_stateful_rule_is_listed():
    built = {name: loss_balancers.build(name, num_tasks=3) for name in loss_balancers.names()}
    assert {options["name"] for options in STATEFUL} == {n for n, rule in built.items() if isinstance(rule, torch.nn.Module)}


@pytest.mark.parametrize("options", STATEFUL, ids=str)
@pytest.mark.parametrize("steps", [1, 50])
def test_a_rule_that_raises_leaves_its_state_as_before(options, steps):
    """Step 50 is one at which igbv2 trains."""
    rule = loss_balancers.build(**options, num_tasks=3)
    run(rule, 0.5 + torch.rand(steps, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    for call in failing(rule):
        before = copy.deepcopy(rule.state_dict())
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            call()
        assert_same_state(rule.state_dict(), before)
