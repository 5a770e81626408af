"""Diagnosis of the network with which a run would begin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from balance import Diagnosis, diagnose
from experiments.training import threads
from experiments.training.data import to_device
from experiments.training.run import build, closed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from omegaconf import DictConfig
    from torch import Tensor

    from experiments.problems.base import Batch
    from experiments.training.run import Run


def diagnose_network(
    config: DictConfig, num_batches: int = 16, steps: int = 50, *, priced: Sequence[str] | None = None
) -> Diagnosis:
    """Diagnose the network with which the trainer would begin, on its first batches.

    Args:
        config: Configuration of the run, whose methods have no effect.
        num_batches: Number of batches.
        steps: Training steps between the two measurements.
        priced: Methods whose steps are timed; None for all.

    Returns:
        The diagnosis.

    Raises:
        ValueError: If a number is out of range, the device is not available, or the data are fewer than two batches.
    """
    threads.use(config.train.threads)
    run = build(config)

    def losses(batch: Batch) -> dict[str, Tensor]:
        return run.problem.losses(run.model(batch[0]), batch)

    shared, rate = run.model.trunk.parameters(), config.train.lr
    with closed(run.agent):
        return diagnose(
            losses,
            first_batches(run),
            model=run.model,
            shared=shared,
            num_batches=num_batches,
            steps=steps,
            lr=rate,
            loss_methods=priced,
            gradient_methods=priced,
        )


def first_batches(run: Run) -> Iterator[Batch]:
    """Yield the batches with which a run would begin, on its device."""
    for batch in run.batches:
        yield to_device(batch, run.config.device)
        if run.agent is not None:
            run.agent.after_step()
