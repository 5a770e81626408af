import pytest
import torch

from balance import gradient_balancers
from balance.testing import KINDS
from tests.strategies import make_jacobian

CERTIFIED = [name for name in gradient_balancers.names() if gradient_balancers.traits(name).certificate is not None]
DEPENDENT = ("duplicate", "opposite", "near_parallel", "low_rank", "rounded", "stationary")
CASES = [  # the projections of dependent gradients are equal in the least-squares sense only
    (name, kind) for name in CERTIFIED for kind in KINDS if name not in ("imtl", "config") or kind not in DEPENDENT
]


def test_every_rule_that_solves_an_optimality_problem_has_a_certificate():
    exact = {"cagrad", "conicgrad", "config", "dualproj", "fairgrad", "imtl", "mgda", "nashmtl", "upgrad"}
    assert exact <= set(CERTIFIED)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_certificate_of_the_default_options_is_nearly_zero_at_the_solution(name, kind):
    certificate = gradient_balancers.traits(name).certificate
    for seed in range(10):
        J = make_jacobian(1 + seed, kind, seed)
        rule = gradient_balancers.build(name, num_tasks=len(J))
        assert certificate(J @ J.T, rule(J @ J.T)) <= 1e-8
        single = (J @ J.T).float()
        if kind in ("generic", "zero_row"):
            assert certificate(single, rule(single)) <= 1e-4


@pytest.mark.parametrize("name", CERTIFIED)
def test_certificate_grows_with_the_distance_from_the_solution(name):
    certificate = gradient_balancers.traits(name).certificate
    J = make_jacobian(4, "generic", 0)
    weights = gradient_balancers.build(name, num_tasks=4)(J @ J.T)
    errors = [certificate(J @ J.T, weights * (1 + size * torch.arange(4))) for size in (1e-6, 1e-4, 1e-2)]
    assert 1e-9 < errors[0] < errors[1] < errors[2]
