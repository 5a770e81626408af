"""Gradient balancers applied to Jacobians."""

import torch

from balance import gradient_balancers

STATIONARY = [[-4.0, 2.0], [2.0, 6.0], [3.0, -3.0]]  # 0 is inside the convex hull


def build(name, num_tasks, **options):
    return gradient_balancers.build(name, num_tasks=num_tasks, **options)


def direction(name, J, **options):
    J = torch.as_tensor(J, dtype=torch.float64)
    rule = build(name, len(J), **options)
    return rule(J) if gradient_balancers.sees(name) == "jacobian" else rule(J @ J.T) @ J
