"""One step of training: losses, balanced backward pass, clipping, update."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from balance import extra_forward
from balance.config import measured

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from balance import Report
    from experiments.problems.base import Batch
    from experiments.training.run import Run


def build_optimizer(run: Run) -> torch.optim.Adam:
    """Build Adam for the model and, with a separate learning rate, for the parameters of the balancer."""
    train = run.config.train
    model = {"params": list(run.model.parameters()), "lr": train.lr, "weight_decay": train.weight_decay}
    return torch.optim.Adam([model, {"params": list(run.balancer.parameters()), "lr": train.balancer_lr}])


def train_step(run: Run, optimizer: Optimizer, batch: Batch) -> Report:
    """Make one step of the optimizer.

    Args:
        run: Network, losses and balancer.
        optimizer: As `build_optimizer` returns it.
        batch: A training batch on the run's device.

    Returns:
        The balancer's report on the step.
    """
    optimizer.zero_grad()
    features = run.model.trunk(batch[0])
    losses = run.problem.losses(run.model.heads(features), batch)
    shared = dict(run.model.trunk.named_parameters())
    measure = measured(shared, run.config.balancer.measure)
    report = run.balancer.backward(losses, shared=shared.values(), features=features, measure=measure)
    clip_gradient(run)
    optimizer.step()
    if run.balancer.needs_observation:
        observe(run, batch)
    return report


def clip_gradient(run: Run) -> None:
    """Clip the gradient of the model, or of its trunk in the published protocol, to ``train.max_norm``."""
    if run.config.train.max_norm is not None:
        clipped = run.model.trunk if run.config.protocol == "paper" else run.model
        torch.nn.utils.clip_grad_norm_(clipped.parameters(), run.config.train.max_norm)


@torch.no_grad()
def observe(run: Run, batch: Batch) -> None:
    """Show the balancer the losses of a batch after the step.

    Statistics of batch normalisation and random numbers do not change, except in the published protocol: the published codes
    let this second forward pass change them.
    """
    with extra_forward(run.model) if run.config.protocol == "sound" else nullcontext():
        run.balancer.observe(run.problem.losses(run.model(batch[0]), batch))
