"""Burgers' equation solved by a network: the losses are the residual of the equation, the boundary and the initial condition.

    u_t + u u_x = (0.01 / pi) u_xx  for x in [-1, 1], t in [0, 1];  u(x, 0) = -sin(pi x),  u(-1, t) = u(1, t) = 0

The solution steepens at x = 0 until viscosity stops it at a front that is about 0.01 wide. Each loss has separate points.

    residual    mean squared residual inside the domain; relative L2 error of the network against the exact solution
    boundary    mean squared error at x = -1 and x = 1; its root
    initial     mean squared error at t = 0; its root

All parameters are shared. A network that learns only one of the three losses solves nothing, so there are no single-task
baselines.
"""

from experiments.problems.burgers.data import DataConfig, load
from experiments.problems.burgers.model import ModelConfig, build_model
from experiments.problems.burgers.tasks import HIGHER_IS_BETTER, SINGLE_TASK_BASELINES, TASKS, losses, metrics, targets
from experiments.problems.burgers.tasks import count_points as counts

__all__ = [
    "HIGHER_IS_BETTER",
    "SINGLE_TASK_BASELINES",
    "TASKS",
    "DataConfig",
    "ModelConfig",
    "build_model",
    "counts",
    "load",
    "losses",
    "metrics",
    "targets",
]
