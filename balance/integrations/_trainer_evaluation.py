"""Task losses of the evaluations of a Hugging Face Trainer."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ..stage.balancer import Balancer
    from ._task_losses import TaskLosses


class MeanLosses:
    """Sums of task losses over samples.

    Args:
        tasks: Names of the tasks.
    """

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self._tasks = tasks
        self._sums = torch.zeros(2, len(tasks), dtype=torch.float64, device="cpu")  # of losses, and of samples

    def add(self, sums: Tensor) -> None:
        """Add sums of losses and numbers of samples. Shape (2, K)."""
        self._sums += sums

    def means(self) -> dict[str, float]:
        """Return the mean loss of every task that was present."""
        rows = zip(self._tasks, *self._sums.tolist(), strict=True)
        return {task: total / count for task, total, count in rows if count > 0}


class EvaluationLosses:
    """Task losses of evaluations: the mean of each loop, and of all loops of an evaluation that a rule observes.

    Samples count as in the Trainer's own ``eval_loss``: the losses of a batch count once for each of its samples.

    Args:
        trainer: The trainer.
        balancer: The balancer.
    """

    def __init__(self, trainer: Any, balancer: Balancer) -> None:
        self._trainer, self._balancer = trainer, balancer
        self._open: list[MeanLosses] = []  # that the current batch belongs to
        self._losses: list[TaskLosses] = []  # of the current batch, if they have been computed

    @contextmanager
    def validation(self, *, is_observed: bool) -> Iterator[None]:
        """Collect the losses of all evaluation loops inside.

        Args:
            is_observed: Pass their means to the balancer, as validation losses.

        Yields:
            Nothing.
        """
        with self.loop() as losses:
            yield
        if is_observed and (means := losses.means()):
            self._balancer.observe_validation({task: torch.tensor(mean) for task, mean in means.items()})

    @contextmanager
    def loop(self) -> Iterator[MeanLosses]:
        """Collect the losses of an evaluation loop.

        Yields:
            The mean losses, complete on exit.
        """
        losses = MeanLosses(self._balancer.tasks)
        self._open.append(losses)
        try:
            yield losses
        finally:
            self._open.remove(losses)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Add the losses of a batch to all open means, over all processes.

        Yields:
            Nothing.
        """
        self._losses.clear()
        yield
        if not self._losses or not self._open:
            return
        sums = self._sums(self._losses.pop())
        for means in self._open:
            means.add(sums)

    def note(self, losses: TaskLosses) -> None:
        """Keep the losses of the current batch."""
        self._losses[:] = [losses]

    def _sums(self, losses: TaskLosses) -> Tensor:
        """Return sums of losses over samples, and numbers of samples, of all processes. Shape (2, K)."""
        args = self._trainer.args
        absent = torch.full((), torch.nan, device=args.device)
        values = [losses.get(task, absent).detach().reshape(()).to(args.device).float() for task in self._balancer.tasks]
        present = [float(task in losses) for task in self._balancer.tasks]
        row = torch.stack([torch.stack(values), torch.tensor(present, device=args.device)])
        rows = self._trainer.gather_function(row.repeat(args.eval_batch_size, 1, 1)).to("cpu", torch.float64)
        weights = rows[:, 1]
        return torch.stack([torch.where(weights > 0, rows[:, 0], 0.0).sum(0), weights.sum(0)])
