"""Results of the rules where their formulas are undefined: as documented, and never NaN for finite input."""

import itertools

import pytest
import torch

from balance import gradient_balancers
from balance.testing import KINDS, make_jacobian
from tests.gradient.directions import build, direction

NAMES = gradient_balancers.names()


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("name", NAMES)
def test_finite_in_finite_out(name, scale):
    for kind, num_tasks in itertools.product(KINDS, (1, 2, 3, 20)):
        assert direction(name, scale * make_jacobian(num_tasks, kind, num_tasks)).isfinite().all(), (kind, num_tasks)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("name", NAMES)
def test_finite_in_finite_out_up_to_a_hundred_tasks(name, scale):
    for kind, num_tasks, seed in itertools.product(KINDS, (1, 2, 3, 100), range(2)):
        assert direction(name, scale * make_jacobian(num_tasks, kind, seed)).isfinite().all(), (kind, num_tasks, seed)


@pytest.mark.parametrize("name", NAMES)
def test_scales_that_differ_by_thirty_decades(name):
    J = make_jacobian(8, "generic", 3) * torch.logspace(-15, 15, 8, dtype=torch.float64)[:, None]
    assert direction(name, J).isfinite().all()


OPPOSITE = [[1.0, -2.0], [-1.0, 2.0]]

# method: (direction at G = 0, opposite gradients, a zero row next to (1, 2, 2), one task (3, 4))
EXPECTED = {
    "mgda": ([0, 0], [0, 0], [0, 0, 0], [3, 4]),
    "pcgrad": ([0, 0], [0, 0], [1, 2, 2], [3, 4]),
    "cagrad": ([0, 0], [0, 0], [1 / 2.32, 2 / 2.32, 2 / 2.32], [3 * 1.4 / 1.16, 4 * 1.4 / 1.16]),
    "imtl": ([0, 0], [0, 0], [1, 2, 2], [3, 4]),
    "nashmtl": ([0, 0], [0, 0], [1 / 3, 2 / 3, 2 / 3], [0.6, 0.8]),
    "graddrop": ([0, 0], None, [1, 2, 2], [3, 4]),
    "gradnorm": ([0, 0], [0, 0], [1, 2, 2], [3, 4]),
    "inverse_norm": ([0, 0], [0, 0], [1, 2, 2], [3, 4]),
    "ntk": ([0, 0], [0, 0], [1, 2, 2], [3, 4]),
    "ema_norm": ([0, 0], [0, 0], [1 / 6, 1 / 3, 1 / 3], [0.6, 0.8]),
    "lr_annealing": ([0, 0], [-1 / 30, 1 / 15], [0.9, 1.8, 1.8], [3, 4]),
    "sdmgrad": ([0, 0], [0, 0], [0.15 / 1.3, 0.3 / 1.3, 0.3 / 1.3], [3, 4]),
    "modo": ([0, 0], [0, 0], [0.49775, 0.9955, 0.9955], [3, 4]),
    "moco": ([0, 0], [0, 0], [0.49375 / 6, 0.49375 / 3, 0.49375 / 3], [0.3, 0.4]),
    "db_mtl": ([0, 0], [0, 0], [0.1, 0.2, 0.2], [0.3, 0.4]),
    "config_momentum": ([0, 0], [0, 0], [1, 1, 1], [1, 1]),
    "excess_mtl": ([0, 0], [0, 0], [1, 2, 2], [3, 4]),
    "pcd": ([0, 0], [-1, 2], [0, 0, 0], [3, 4]),
    "cr_mogm": ([0, 0], [0, 0], [0, 0, 0], [3, 4]),
    "epo": ([0, 0], [0, 0], [1, 2, 2], [3, 4]),
    "pmgda": ([0, 0], [0, 0], [1, 2, 2], [3, 4]),
    "upgrad": ([0, 0], [0, 0], [0.5, 1, 1], [3, 4]),
    "dualproj": ([0, 0], [0, 0], [0.5, 1, 1], [3, 4]),
    "aligned_mtl": ([0, 0], [0, 0], [0.5, 1, 1], [3, 4]),
    "fairgrad": ([0, 0], [0, 0], [3 ** (-4 / 3), 2 * 3 ** (-4 / 3), 2 * 3 ** (-4 / 3)], [3 * 5 ** (-4 / 3), 4 * 5 ** (-4 / 3)]),
    "gradvac": ([0, 0], [0, 0], [1, 2, 2], [3, 4]),
    "config": ([0, 0], [0, 0], [1, 2, 2], [3, 4]),
    "conicgrad": ([0, 0], [0, 0], [1, 2, 2], [3, 4]),
    "krum": ([0, 0], [0, 0], [0.5, 1, 1], [3, 4]),
    "trimmed_mean": ([0, 0], [0, 0], [0.5, 1, 1], [3, 4]),
    "sam_gs": ([0, 0], [0, 0], [0.5, 1, 1], [9000, 16000]),
    "mean": ([0, 0], [0, 0], [0.5, 1, 1], [3, 4]),
    "sum": ([0, 0], [0, 0], [1, 2, 2], [3, 4]),
    "random": ([0, 0], None, None, [3, 4]),
}


DEFAULTS = {
    "cagrad": {"c": 0.4, "rescale": "paper", "solver": "exact"},
    "graddrop": {"leak": 0.0, "seed": 0},
    "imtl": {"official": False},
    "mgda": {"normalization": "none"},
    "nashmtl": {"max_norm": 1.0, "solver": "newton"},
    "pcgrad": {"order": "random", "seed": 0},
    "gradnorm": {"alpha": 1.5, "lr": 0.025},
    "inverse_norm": {"beta": 0.9},
    "ntk": {"estimate": "quotient", "residuals": None},
    "ema_norm": {"decay": 0.999, "total_norm": 1.0, "shares": None},
    "lr_annealing": {"beta": 0.9, "main_task": 0},
    "sdmgrad": {"lam": 0.3, "lr": 5.0, "steps": 20, "momentum": 0.5},
    "modo": {"lr": 1e-3, "rho": 0.1},
    "moco": {
        "beta": 0.5,
        "beta_sigma": 0.5,
        "gamma": 0.1,
        "gamma_sigma": 0.5,
        "rho": 0.0,
        "normalization": "loss",
        "official": False,
    },
    "db_mtl": {"beta": 0.9, "beta_sigma": 0.0, "epsilon": 0.0},
    "config_momentum": {"beta_1": 0.9, "beta_2": 0.999},
    "excess_mtl": {"lr": 1e-2},
    "pcd": {"primary": 0, "beta": 0.999, "tau": 0.02},
    "cr_mogm": {"rule": "mgda", "alpha": 0.9, "sigma": 0.0, "initial": None, "seed": 0},
    "epo": {"preference": None, "tolerance": 1e-4},
    "pmgda": {"preference": None, "tolerance": 1e-2, "sigma": 0.8},
    "upgrad": {"preference": None, "reg_eps": 0.0},
    "dualproj": {"preference": None, "reg_eps": 0.0},
    "aligned_mtl": {"scale_mode": "min", "preference": None},
    "fairgrad": {"alpha": 2.0},
    "gradvac": {"beta": 0.5, "order": "random", "seed": 0},
    "config": {"preference": None, "length": "projection"},
    "conicgrad": {"c": 0.5},
    "krum": {"num_byzantine": 0, "num_selected": 1, "distance": "euclidean"},
    "trimmed_mean": {"trim": None},
    "sam_gs": {"gamma": 0.7, "beta1": 0.9, "beta2": 0.99},
    "mean": {},
    "sum": {},
    "random": {"seed": 0},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_as_documented(name):
    assert {option: p.default for option, p in gradient_balancers.options(name).items()} == DEFAULTS[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_documented_results(name):
    at_zero, opposite, zero_row, one = EXPECTED[name]
    assert direction(name, [[0.0, 0.0], [0.0, 0.0]]).tolist() == at_zero
    if opposite is not None:
        assert direction(name, OPPOSITE).tolist() == pytest.approx(opposite, abs=1e-12)
    if zero_row is not None:
        assert direction(name, [[0.0, 0.0, 0.0], [1.0, 2.0, 2.0]]).tolist() == pytest.approx(zero_row)
    assert direction(name, [[3.0, 4.0]]).tolist() == pytest.approx(one)


@pytest.mark.parametrize("name", NAMES)
def test_duplicates_act_like_one_gradient_twice(name):
    """Equal gradients get equal weights, or are interchangeable."""
    J = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [-1.0, 1.0, 1.0]], dtype=torch.float64)
    assert direction(name, J).isfinite().all()
    if gradient_balancers.sees(name) == "gramian" and name not in ("pcgrad", "gradvac", "cagrad", "krum", "random", "pcd"):
        weights = build(name, 3)(J @ J.T)
        assert weights[0].item() == pytest.approx(weights[1].item())


def test_imtl_and_nash_agree_in_direction_for_two_tasks():
    J = make_jacobian(2, "generic", 5)
    a, b = direction("imtl", J), direction("nashmtl", J)
    torch.testing.assert_close(a / a.norm(), b / b.norm())


@pytest.mark.parametrize("name", ["cagrad", "nashmtl"])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 6])
def test_cvxpy_agrees(name, num_tasks):
    """An independent convex program as oracle, to the accuracy of its solver."""
    for seed in range(3):
        J = make_jacobian(num_tasks, "generic", seed)
        a, b = direction(name, J), direction(name, J, solver="cvxpy")
        assert (a - b).norm() <= 1e-3 * a.norm()


@pytest.mark.parametrize("name", ["cagrad", "nashmtl"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_cvxpy_agrees_at_other_scales(name, scale):
    J = scale * make_jacobian(3, "generic", 0)
    a, b = direction(name, J), direction(name, J, solver="cvxpy")
    assert (a - b).norm() <= 1e-3 * a.norm()


@pytest.mark.parametrize("name", ["cagrad", "nashmtl"])
def test_cvxpy_agrees_where_there_is_no_solution(name):
    torch.testing.assert_close(direction(name, OPPOSITE, solver="cvxpy"), direction(name, OPPOSITE), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cagrad", {"c": -0.1}, "not be negative"),
        ("cagrad", {"rescale": 3}, "must be one of 'none', 'paper', 'bound', 0, 1, 2"),
        ("nashmtl", {"max_norm": 0.0}, "must be positive or None"),
        ("nashmtl", {"update_every": 5}, "has no option 'update_every'"),
        ("graddrop", {"leak": 1.5}, r"must be in 0\.\.1"),
        ("graddrop", {"leak": -0.5}, r"must be in 0\.\.1"),
        ("mgda", {"normalization": "l1"}, "must be one of"),
        ("gradnorm", {"alpha": -1.0}, "alpha of 'gradnorm' must not be negative"),
        ("gradnorm", {"lr": 0.0}, "lr of 'gradnorm' must be positive"),
        ("inverse_norm", {"beta": 1.0}, "beta of 'inverse_norm' must be in"),
        ("ntk", {"residuals": [1, 2]}, "residuals of 'ntk' must be one positive number for each task"),
        ("ntk", {"residuals": [1, 2, 0]}, "residuals of 'ntk' must be one positive number for each task"),
        ("ntk", {"estimate": "trace"}, "must be one of"),
        ("ema_norm", {"decay": 0.0}, "decay of 'ema_norm' must be in"),
        ("ema_norm", {"total_norm": 0.0}, "total_norm of 'ema_norm' must be positive"),
        ("ema_norm", {"shares": [1.0, 2.0]}, "shares of 'ema_norm' must be one positive number for each task"),
        ("lr_annealing", {"beta": -0.1}, "beta of 'lr_annealing' must be in"),
        ("lr_annealing", {"main_task": 3}, r"main_task of 'lr_annealing' must be in 0\.\.2"),
        ("sdmgrad", {"lam": -1.0}, "lam of 'sdmgrad' must not be negative"),
        ("sdmgrad", {"lr": 0.0}, "lr of 'sdmgrad' must be positive"),
        ("sdmgrad", {"steps": 0}, "steps of 'sdmgrad' must be at least 1"),
        ("sdmgrad", {"momentum": 1.0}, "momentum of 'sdmgrad' must be in"),
        ("modo", {"lr": 0.0}, "lr of 'modo' must be positive"),
        ("modo", {"rho": -0.1}, "rho of 'modo' must not be negative"),
        ("moco", {"beta": 0.0}, "beta of 'moco' must be in"),
        ("moco", {"gamma": 0.0}, "gamma of 'moco' must be positive"),
        ("moco", {"rho": -1.0}, "must not be negative"),
        ("db_mtl", {"beta": 1.0}, "beta of 'db_mtl' must be in"),
        ("db_mtl", {"epsilon": -1.0}, "must not be negative"),
        ("config_momentum", {"beta_2": 1.0}, "beta_2 of 'config_momentum' must be in"),
        ("excess_mtl", {"lr": 0.0}, "lr of 'excess_mtl' must be positive"),
        ("pcd", {"primary": 3}, r"primary of 'pcd' must be in 0\.\.2"),
        ("pcd", {"beta": 1.0}, "beta of 'pcd' must be in"),
        ("pcd", {"tau": 1.1}, r"tau of 'pcd' must be in 0\.\.1"),
        ("cr_mogm", {"alpha": 1.0}, "alpha of 'cr_mogm' must be in"),
        ("cr_mogm", {"sigma": -1.0}, "sigma of 'cr_mogm' must not be negative"),
        ("cr_mogm", {"initial": [1.0]}, "initial of 'cr_mogm' must have one number for each of 3 tasks"),
        ("cr_mogm", {"rule": "graddrop"}, "returns weights"),
        ("cr_mogm", {"rule": "mdga"}, "Did you mean 'mgda'"),
        ("epo", {"preference": [1.0, 2.0]}, "preference of 'epo' must be one positive number for each task"),
        ("epo", {"tolerance": 0.0}, "tolerance of 'epo' must be positive"),
        ("pmgda", {"preference": [1.0, -2.0, 1.0]}, "preference of 'pmgda' must be one positive number for each task"),
        ("pmgda", {"tolerance": 0.0}, "tolerance of 'pmgda' must be positive"),
        ("pmgda", {"sigma": 1.5}, r"sigma of 'pmgda' must be in 0\.\.1"),
        ("upgrad", {"reg_eps": -1e-4}, "must not be negative"),
        ("upgrad", {"preference": [1.0, 2.0]}, "must have one number for each task"),
        ("dualproj", {"preference": [1.0, 2.0, 0.0]}, "must be a list of positive numbers"),
        ("aligned_mtl", {"preference": [1.0, 2.0, -1.0]}, "must be a list of positive numbers"),
        ("aligned_mtl", {"scale_mode": "max"}, "must be one of 'min', 'median', 'rmse'"),
        ("fairgrad", {"alpha": 0.0}, r"must be in 0\.1\.\.100"),
        ("gradvac", {"beta": 1.5}, r"must be in 0\.\.1"),
        ("config", {"length": -1}, "must be a name or the index of a task"),
        ("config", {"preference": [1.0, 2.0, 3.0, 4.0]}, "must have one number for each task"),
        ("conicgrad", {"c": 0.0}, "must be above 0 and at most 1"),
        ("krum", {"num_byzantine": -1}, "must not be negative"),
        ("krum", {"num_byzantine": 1}, "must be at most 3 tasks - 3"),
        ("krum", {"num_selected": 4}, r"must be in 1\.\.3"),
        ("sam_gs", {"gamma": 1.5}, r"must be in 0\.\.1"),
        ("sam_gs", {"beta1": 1.0}, "must be at least 0 and below 1"),
    ],
)
def test_mistakes(name, options, message):
    from balance import Balancer

    with pytest.raises(ValueError, match=message):
        Balancer(3, gradient=name, gradient_options=options)
