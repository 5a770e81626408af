"""One step of training: losses, balanced backward pass, clipping, update."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from torch.optim import Optimizer

from balance import extra_forward
from balance.config import measured
from experiments.training import ranks
from experiments.training.data import num_samples, to_device

if TYPE_CHECKING:
    from collections.abc import Iterable

    from balance import Report
    from experiments.problems.base import Batch, ByTask
    from experiments.training.run import Run


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_optimizer(run: Run) -> Optimizer:
    """Return an optimizer of the model and, with another learning rate, of the balancer's parameters.

    With ``balancer.metric=optimizer`` it becomes the metric of the balancer.

    Args:
        run: The run.

    Returns:
        A new optimizer.
    """
    train = run.config.train
    classes: dict[str, type[Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    model = {"params": run.model.trained(), "lr": train.lr, "weight_decay": train.weight_decay}
    balancer = {"params": list(run.balancer.parameters()), "lr": train.balancer_lr, "weight_decay": 0.0}
    options: Any = OmegaConf.to_container(run.config.optimizer)
    optimizer = classes[train.optimizer]([model, balancer], **options)
    if run.config.balancer.metric == "optimizer":
        run.balancer.metric = optimizer
    return optimizer


def autocast(run: Run) -> torch.autocast:
    """Return the context of a forward pass and its losses, in the precision of the run."""
    dtype = DTYPES[run.config.train.precision]
    return torch.autocast(torch.device(run.config.device).type, dtype, enabled=dtype != torch.float32)


def train_step(run: Run, optimizer: Optimizer, batch: Batch | None) -> Report:
    """Make one step of the optimizer. Every rank must call it, also without a sample.

    Args:
        run: Network, losses and balancer.
        optimizer: As `build_optimizer` returns it.
        batch: A training batch on the run's device, of several ranks the part of this rank; None for no sample.

    Returns:
        The balancer's report on the step.
    """
    optimizer.zero_grad()
    report = separate_backward(run, batch) if in_micro_batches(run) else backward(run, batch)
    clip_gradient(run, optimizer)
    run.scaler.step(optimizer)
    run.scaler.update()
    if run.balancer.needs_observation:
        observe(run, batch)
    return report


def in_micro_batches(run: Run) -> bool:
    """Return whether a step computes micro-batches one after the other. All ranks agree on it."""
    return run.problem.micro_batches is not None and bool(run.config.train.micro_batches)


def micro_batches(run: Run, batch: Batch | None) -> Iterable[Batch]:
    """Return the micro-batches of a batch; the batch itself, if they are computed together, and nothing for no sample."""
    if batch is None:
        return ()
    separate = run.problem.micro_batches
    return separate(batch) if separate is not None and in_micro_batches(run) else (batch,)


def backward(run: Run, batch: Batch | None) -> Report:
    """Balance the losses of a batch, and add the result to ``.grad``."""
    features, losses = (None, {}) if batch is None else compute_losses(run, batch)
    shared = dict(run.model.trunk.named_parameters())
    measure = measured(shared, run.config.balancer.measure)
    counts = counts_of(run, losses, batch)
    return run.balancer.backward(
        losses, shared=shared.values(), features=features, measure=measure, scaler=run.scaler, counts=counts
    )


def separate_backward(run: Run, batch: Batch | None) -> Report:
    """Balance the losses of a batch in one forward and backward pass for each micro-batch; the graph of each is freed."""
    with run.balancer.collect():
        for micro_batch in micro_batches(run, batch):
            backward(run, micro_batch)
    report = run.balancer.report
    assert report is not None
    return report


def compute_losses(run: Run, batch: Batch) -> tuple[Any, ByTask]:
    """Return the features and the losses of a batch."""
    with autocast(run):
        features, outputs = run.forward(batch[0])
        return features, run.problem.losses(outputs, batch)


def counts_of(run: Run, losses: ByTask, batch: Batch | None) -> dict[str, int] | None:
    """Return the number of samples that each loss of this rank is a mean of; None if the losses are not weighted by it."""
    if batch is None or (ranks.size() == 1 and not in_micro_batches(run)):
        return None
    if run.problem.counts is None:
        return dict.fromkeys(losses, num_samples(batch))
    counts = run.problem.counts(batch)
    return {task: counts[task] for task in losses}


def clip_gradient(run: Run, optimizer: Optimizer) -> None:
    """Clip the gradient of the model, or of its trunk in the published protocol, to ``train.max_norm``."""
    if run.config.train.max_norm is not None:
        run.scaler.unscale_(optimizer)
        clipped = list(run.model.trunk.parameters()) if run.config.protocol == "paper" else run.model.trained()
        torch.nn.utils.clip_grad_norm_(clipped, run.config.train.max_norm)


@torch.no_grad()
def observe(run: Run, batch: Batch | None) -> None:
    """Show the balancer the losses of a batch after the step.

    Statistics of batch normalisation and random numbers do not change, except in the published protocol: the published codes
    let this second forward pass change them.
    """
    with extra_forward(run.model) if run.config.protocol == "sound" else nullcontext():
        losses = mean_losses(run, batch)
    run.balancer.observe(losses, counts=counts_of(run, losses, batch))


def mean_losses(run: Run, batch: Batch | None) -> ByTask:
    """Return the losses of a batch without gradients: their means over the micro-batches, each weighted by its count."""
    totals: dict[str, Any] = {}
    numbers: dict[str, int] = {}
    for micro_batch in micro_batches(run, batch):
        with autocast(run):
            losses = run.problem.losses(run.model(micro_batch[0]), micro_batch)
        counts = counts_of(run, losses, micro_batch) or dict.fromkeys(losses, 1)
        for task, loss in losses.items():
            totals[task] = totals.get(task, 0) + counts[task] * loss
            numbers[task] = numbers.get(task, 0) + counts[task]
    return {task: total / numbers[task] for task, total in totals.items()}


@torch.no_grad()
def observe_validation(run: Run, step: int) -> None:
    """Show the balancer the losses of a batch of validation data, if it needs them after this step. Every rank must call it.

    The batches have the size of training batches and go round the validation data. The number of the step determines the batch,
    so a resumed run continues with the same batches. The network is in evaluation mode, and nothing of it changes.

    Args:
        run: Network, losses and balancer.
        step: Number of the training step, from 0.
    """
    number, rest = divmod(step, run.config.train.validation_interval)
    if not run.balancer.needs_validation or rest:
        return
    data: Any = run.data.validation
    size = min(run.config.train.batch_size, len(data))
    indices = [(number * size + i) % len(data) for i in range(size)]
    own = indices[ranks.part(size)]
    batch = to_device(data[own], run.config.device) if own else None
    run.model.eval()
    losses = mean_losses(run, batch)
    run.model.train()
    run.balancer.observe_validation(losses, counts=counts_of(run, losses, batch))
