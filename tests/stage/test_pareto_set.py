"""Optimization with the whole stage reaches the Pareto set."""

import pytest
import torch

from balance import Balancer, gradient_balancers
from balance.solvers.min_norm import min_norm_weights

# Rules that lead to a ray of the raw losses, which need not meet the Pareto set here
TO_A_RAY = ("epo", "pmgda")
OPTIONS = {"gradnorm": {"lr": 1e-4}}  # the gradients are long here, so that weights of the default rate do not settle


RULES = [None, *(name for name in gradient_balancers.names() if name not in TO_A_RAY)]
FAST = (None, "mgda", "nashmtl")  # with every loss balancer
OF_EACH_FAMILY = ("pcgrad", "cagrad", "imtl", "upgrad", "graddrop", "gradnorm", "moco")  # with ls; all others are slow
PAIRS = [
    pytest.param(loss, rule, marks=[] if rule in FAST or (loss == "ls" and rule in OF_EACH_FAMILY) else pytest.mark.slow)
    for loss in ("ls", "uw", "famo")
    for rule in RULES
]


@pytest.mark.filterwarnings("ignore:nashmtl ignores positive loss weights")
@pytest.mark.parametrize(("loss", "gradient"), PAIRS)
def test_quadratics_reach_the_pareto_set(loss, gradient):
    """Three quadratics with different minima: at the end a convex combination of the task gradients is zero."""
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    scales = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
    theta = torch.tensor([9.0, -7.0], dtype=torch.float64, requires_grad=True)

    def losses():
        return scales * ((theta - centres).square().sum(dim=1) + 1)

    balancer = Balancer(3, loss=loss, gradient=gradient, gradient_options=OPTIONS.get(gradient))
    optimizer = torch.optim.Adam([{"params": [theta], "lr": 0.3}, {"params": list(balancer.parameters()), "lr": 0.01}])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    for _ in range(350):
        optimizer.zero_grad()
        balancer.backward(losses(), shared=[theta])
        optimizer.step()
        schedule.step()
        if balancer.needs_observation:
            balancer.observe(losses().detach())
    J = 2 * (theta.detach() - centres)
    G = (J @ J.T).numpy()
    w = min_norm_weights(G)
    assert w @ G @ w < 1e-2
