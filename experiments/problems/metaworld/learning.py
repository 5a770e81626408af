"""Losses of a soft actor-critic, and updates of networks that the trainer's optimizer does not train.

Source: Haarnoja et al., Soft Actor-Critic Algorithms and Applications, arXiv 1812.05905, equations 5 to 7, 9 and 18.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from balance import Balancer
    from experiments.problems.metaworld.networks import SoftActorCritic
    from experiments.problems.metaworld.replay import Transitions

ByTask = dict[str, "Tensor"]


class Rows(NamedTuple):
    """Tasks of the rows of a batch. Rows of a task are adjacent, in the order of the tasks."""

    tasks: Tensor  # (B,)
    counts: tuple[int, ...]  # rows of each task

    def means(self, values: Tensor, names: Sequence[str]) -> ByTask:
        """Return the mean of the values of each task that has any. Shape (B,) -> ()."""
        parts = zip(names, torch.split(values, list(self.counts)), strict=True)
        return {name: part.mean() for name, part in parts if len(part)}


def draw_rows(tasks: int, size: int, *, mixed: bool) -> Rows:
    """Return the tasks of a batch: a random task for each row, or as equal numbers of rows as the size allows."""
    drawn = torch.randint(tasks, (size,)) if mixed else torch.arange(size) % tasks
    return Rows(drawn.sort().values, tuple(drawn.bincount(minlength=tasks).tolist()))


@torch.no_grad()
def target_values(network: SoftActorCritic, transitions: Transitions, rows: Rows, discount: float) -> Tensor:
    """Return the values that the critics are to learn: reward and discounted soft value of the next observation. Shape (B,)."""
    following = network.with_identity(transitions.following, rows.tasks)
    actions, log_density = network.actor.sample(following)
    values = network.target_values(critic_inputs(network, transitions.following, actions, rows))
    return transitions.rewards + discount * (values.amin(0) - network.temperatures(rows.tasks) * log_density)


def critic_inputs(network: SoftActorCritic, observations: Tensor, actions: Tensor, rows: Rows) -> Tensor:
    """Return inputs of the critics. Shapes (B, D), (B, A) -> (B, inputs)."""
    return network.with_identity(torch.cat([observations, actions], dim=1), rows.tasks)


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Compute no gradients of these parameters."""
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True


class Learner:
    """An optimizer of parameters, with a balancer of their losses or without one.

    Args:
        parameters: Parameters to train.
        rate: Learning rate of Adam.
        balancer: Balances the losses of the tasks; None for the mean over all rows.
        balancer_rate: Learning rate of the balancer's own parameters.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], rate: float, balancer: Balancer | None, balancer_rate: float
    ) -> None:
        self.parameters = list(parameters)
        self.balancer = balancer
        own = [] if balancer is None else list(balancer.parameters())
        groups: list[dict[str, Any]] = [{"params": self.parameters}, {"params": own, "lr": balancer_rate}]
        self.optimizer = torch.optim.Adam(groups, lr=rate, fused=True)

    def step(self, losses: Callable[[], ByTask], rows: Rows) -> None:
        """Make a step.

        Args:
            losses: Returns the losses by task; called again after the step if the balancer observes it.
            rows: Rows of the batch.
        """
        self.optimizer.zero_grad()
        if self.balancer is None:
            counts = torch.tensor([count for count in rows.counts if count], dtype=torch.float32)
            values = torch.stack(list(losses().values()))
            (counts.to(values.device) / len(rows.tasks) @ values).backward()  # type: ignore[no-untyped-call]
        else:
            self.balancer.backward(losses(), shared=self.parameters)
        self.optimizer.step()
        if self.balancer is not None and self.balancer.needs_observation:
            with torch.no_grad():
                self.balancer.observe(losses())

    def state_dict(self) -> dict[str, Any]:
        """Return the states of optimizer and balancer."""
        balancer = None if self.balancer is None else self.balancer.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "balancer": balancer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.balancer is not None:
            self.balancer.load_state_dict(state["balancer"])
