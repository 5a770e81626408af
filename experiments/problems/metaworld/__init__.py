"""A robot arm that learns several tasks of Metaworld at once, by multi-task soft actor-critic; the stage balances the critics.

The loss of a task is the mean squared error of both critics on its transitions. Actor and temperatures are trained with the
mean over all tasks; ``agent.balanced`` gives them separate balancers. Methods that look at the losses after a step, such as
famo, see the losses of the same batch with the same target values.

    reach, drawer-close, button-press-topdown, ...   rate of success, the share of episodes with a success at any step
    all/...                                          mean of the tasks: as reported, best, last, and over all evaluations

By default three tasks have one goal each, and the networks are small. ``data.tasks=all`` has the ten tasks of MT10, and
``protocol=paper`` their published settings. ``data.source=points`` is a tiny environment without a simulator.

Source: FAMO (Liu et al., NeurIPS 2023), section 5.2, with the agent of facebookresearch/mtrl.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("gymnasium") is None:
    raise ModuleNotFoundError("The experiment 'metaworld' needs gymnasium: pip install -e . --group rl.")

from experiments.problems.metaworld.agent import build_agent
from experiments.problems.metaworld.data import TASKS, DataConfig, load, task_names
from experiments.problems.metaworld.networks import ModelConfig, build_model
from experiments.problems.metaworld.options import AgentConfig
from experiments.problems.metaworld.tasks import HIGHER_IS_BETTER, losses, metrics, score, summarize

SINGLE_TASK_BASELINES = False

__all__ = [
    "HIGHER_IS_BETTER",
    "SINGLE_TASK_BASELINES",
    "TASKS",
    "AgentConfig",
    "DataConfig",
    "ModelConfig",
    "build_agent",
    "build_model",
    "load",
    "losses",
    "metrics",
    "score",
    "summarize",
    "task_names",
]
