"""Results of the rules where their formulas are undefined: as documented, and never NaN for finite input."""

import pytest
import torch

from balance import gradient_balancers
from balance.testing import KINDS, make_jacobian
from tests.gradient.directions import build, direction

NAMES = gradient_balancers.names()


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 100])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_finite_in_finite_out(name, kind, scale, num_tasks):
    for seed in range(2):
        assert direction(name, scale * make_jacobian(num_tasks, kind, seed)).isfinite().all()


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
    if gradient_balancers.sees(name) == "gramian" and name not in ("pcgrad", "gradvac", "cagrad", "krum", "random"):
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
