"""Agreement of all ranks on one step: mean losses over the batches of all ranks, present tasks, and parameters.

Loss k is a mean over the samples of this rank. The step has its mean over the samples of all ranks:

    L_k = Σ_r n_k^r L_k^r / Σ_r n_k^r        its gradient = Σ_r c_k^r ∇L_k^r,    c_k^r = n_k^r / Σ_r n_k^r

All ranks learn the sums in one all-reduce, before any check of values. So they all take the step, or all refuse it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..distributed.wrappers import Model, read_model
from .arguments import StepLosses

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from ..distributed.ranks import Ranks
    from ..engine.graph import Root

_REMEDY = (
    "Wrap the whole model in one DistributedDataParallel, whose order of parameters all ranks share, and compute the losses of "
    "its output. If a rank may have no loss at all, also give shared=model.trunk.parameters()."
)


class Agreed(NamedTuple):
    """A step on which all ranks have agreed.

    Attributes:
        step: Mean losses over all ranks; roots and shares belong to this rank.
        model: The parameters.
        is_even: Whether every rank has a loss of every task of the step; with FSDP2, one without samples suffices.
        has_idle_rank: Whether a rank has no loss at all.
        has_extra: Whether a rank has an extra loss.
        is_half: Whether a loss of any rank is of half precision.
        num_unreached: Number of parameters that the losses of a rank do not reach, summed over ranks.
    """

    step: StepLosses
    model: Model
    is_even: bool
    has_idle_rank: bool
    has_extra: bool
    is_half: bool
    num_unreached: int


def agree(
    step: StepLosses,
    tasks: tuple[str, ...],
    leaves: Sequence[Tensor],
    parameters: Iterable[Tensor],
    ranks: Ranks,
    *,
    extra: bool,
    is_collected: bool = False,
) -> Agreed:
    """Agree on a step with all other ranks.

    Args:
        step: The losses of this rank.
        tasks: Names of all tasks.
        leaves: Leaf tensors that the losses of this rank reach, and the shared parameters.
        parameters: Parameters of the balancer.
        ranks: The ranks.
        extra: Whether this rank has an extra loss.
        is_collected: Whether the gradients have been computed before, so that the losses have no graph.

    Returns:
        The step of all ranks.

    Raises:
        RuntimeError: If a wrapper contains the balancer, or the ranks do not have the same parameters in a known order.
        ValueError: If no loss of any rank requires a gradient.
    """
    model = read_model(leaves)
    _refuse_wrapped_balancer(model, parameters)
    num_unreached = 0 if model.is_sharded else len(model.parameters) - len({id(leaf) for leaf in leaves})
    num_roots = len(step.tasks) if is_collected else sum(root is not None for root in step.roots)
    facts = [not step.tasks, extra, step.is_half, num_unreached, num_roots, model.layout, model.layout**2]
    by_task = _sums_by_task(step)
    if model.is_sharded:
        by_task[2, list(step.idle)] = 1.0
    sums = ranks.sum(torch.cat([by_task.flatten(), by_task.new_tensor(facts)]))
    totals = sums[: 3 * len(tasks)].view(3, len(tasks))
    idle, extras, half, unreached, roots, layout, squares = sums[3 * len(tasks) :].tolist()
    is_even = all(not n or count == ranks.size for n, count in zip(*totals[1:].tolist(), strict=True))
    if model.is_sharded and not is_even:
        raise RuntimeError(
            "With sharded parameters (FSDP2) every rank must run the backward pass of every task, but a task is absent on some "
            "ranks. There, give a loss without samples: losses={'depth': (output * 0).sum()}, counts={'depth': 0}."
        )
    if layout**2 != ranks.size * squares or not (is_even or model.order_is_known):
        raise RuntimeError(f"All ranks must have the same parameters in the same order, but here they may not. {_REMEDY}")
    if totals[2].any() and not roots:
        raise ValueError("No loss requires a gradient. Compute the losses with gradients enabled and do not detach them.")
    return Agreed(
        _global_step(step, tasks, totals, by_task[1], step.idle if model.is_sharded else {}),
        model,
        is_even,
        bool(idle),
        bool(extras),
        bool(half),
        int(unreached),
    )


def mean_over_ranks(step: StepLosses, tasks: tuple[str, ...], ranks: Ranks) -> StepLosses:
    """Return the mean losses of a step over all ranks, without gradients."""
    by_task = _sums_by_task(step)
    own = by_task[1].clone()
    totals = ranks.sum(by_task)
    return _global_step(step, tasks, totals, own, {})


def _sums_by_task(step: StepLosses) -> Tensor:
    """Return sums of the losses over the samples, numbers of samples, and presence, of all tasks. Shape (3, tasks), float64."""
    counts = torch.tensor(step.counts, dtype=torch.float64, device="cpu")
    by_task = torch.zeros(3, step.num_tasks, dtype=torch.float64, device="cpu")
    by_task[0, step.indices], by_task[1, step.indices], by_task[2, step.indices] = counts * step.host, counts, 1.0
    return by_task


def _global_step(
    step: StepLosses, tasks: tuple[str, ...], totals: Tensor, counts: Tensor, idle: Mapping[int, Root]
) -> StepLosses:
    """Return the step of all ranks.

    Args:
        step: The losses of this rank.
        tasks: Names of all tasks.
        totals: Sums by task over ranks, as `_sums_by_task` returns them.
        counts: Numbers of samples of this rank. Shape (tasks,).
        idle: Losses of tasks without samples on this rank, whose backward passes run nevertheless.

    Returns:
        The mean losses.
    """
    indices = totals[1].nonzero().flatten()
    means = (totals[0] / totals[1])[indices]
    shares = (counts / totals[1])[indices]
    roots = dict(idle) | dict(zip(step.indices.tolist(), step.roots, strict=True))
    known = {
        "indices": indices,
        "roots": [roots.get(k) for k in indices.tolist()],
        "host": means,
        "counts": tuple(totals[1][indices].tolist()),
        "one": step.one,
    }
    losses = means.to(step.one.device, torch.float32 if step.one.device.type == "mps" else torch.float64)
    names = tuple(tasks[k] for k in indices.tolist())
    return StepLosses(names, step.num_tasks, losses, known=known, shares=tuple(shares.tolist()))


def _refuse_wrapped_balancer(model: Model, parameters: Iterable[Tensor]) -> None:
    wrapped = {id(parameter) for parameter in model.parameters}
    if any(id(parameter) in wrapped for parameter in parameters):
        raise RuntimeError(
            "A balancer must not be part of the model that DistributedDataParallel wraps: its parameters get gradients of the "
            "whole batch, without a reduction. Keep it next to the model. Lightning wraps the whole module: there, use "
            "balance.integrations.lightning.BalanceCallback."
        )
