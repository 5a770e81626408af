"""Options of the agent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from balance.config import setting


@dataclass
class AgentConfig:
    """Collection of transitions, and updates of actor and temperatures, always by Adam with a constant rate.

    The entries of ``train`` for optimizer, schedule, clipping, weight decay and precision belong to the critics only.
    """

    epoch_steps: int = setting(1500, minimum=1, help="steps of training between two evaluations")
    random_steps: int = setting(1500, minimum=1, help="steps with random actions before the first step of training")
    first_updates: int = setting(
        0, minimum=0, help="number of first steps of training only on the random transitions; no environment moves in them"
    )
    discount: float = setting(0.99, minimum=0, maximum=1, help="factor of a reward one step later")
    replay_size: int = setting(1_000_000, minimum=1, help="transitions of all tasks that are kept")
    sampling: Literal["equal", "mixed"] = setting(
        "equal", help="tasks in a batch: equal numbers of transitions, or a random task for each transition"
    )
    reward_rate: float = setting(
        0.001,
        minimum=0,
        below=1,
        help="share of a new reward in the moving variance of a task's rewards, whose root divides them; 0: as they are",
    )
    lr: float | None = setting(None, above=0, help="learning rate of Adam for actor and temperatures; null: train.lr")
    target_entropy: float | None = setting(None, help="entropy that the temperatures aim at; null: minus the size of an action")
    balanced: list[str] = setting(
        [], choices=("actor", "temperature"), help="further losses that get a separate balancer, with the same methods"
    )
