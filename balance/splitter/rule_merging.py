"""Merging of feature gradients by a gradient balancer."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from ..rules.context import Context
from ..rules.snapshot import restored_on_error
from ..stage.loss_weighting import Weighting
from .feature_gradients import sum_over_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from ..distributed.ranks import Ranks
    from ..rules.protocol import GradientBalancer, JacobianBalancer
    from ..types import Direction, Gramian, Jacobian, Weights
    from .feature_gradients import FeatureGradients
    from .function import PassMemory


class Merged(NamedTuple):
    """Merged gradients of one backward pass, and its record.

    Attributes:
        pieces: Gradient of each feature tensor, flat; None for an unreached tensor.
        present: Indices of the tasks that are present on any rank.
        weights: Weights of the gradients of all tasks; None without weights. Shape (K,).
        gramian: Inner products of the gradients times the tasks' weights. Shape (K, K); None if no task is present.
    """

    pieces: list[Tensor | None]
    present: list[int]
    weights: Weights | None = None
    gramian: Gramian | None = None


def merge_by_rule(
    rule: GradientBalancer | JacobianBalancer,
    gradients: FeatureGradients,
    memory: PassMemory,
    task_weights: Tensor,
    tasks: Sequence[str],
    scale: float,
    ranks: Ranks,
) -> Merged:
    """Apply a gradient balancer to the tasks that are present on any rank.

    Args:
        rule: The gradient balancer.
        gradients: The gradients of this rank.
        memory: Results of the first backward pass over the graph.
        task_weights: Factors on the gradients, as if the losses were weighted. Shape (K,).
        tasks: Names of all K tasks.
        scale: Scale factor of mixed precision in the gradients.
        ranks: The processes that train together.

    Returns:
        The merged gradients of this rank.

    Raises:
        RuntimeError: If the rule sees the Jacobian and several processes train together.
    """
    G = gradients.rows.gramian(gradients.indices.device)  # (k, k)
    sums = sum_over_ranks(G.diagonal(), G, gradients, len(tasks), ranks)
    present = sums.tasks
    if not present or sums.gramian is None:
        return Merged(gradients.combined(G.diagonal()), present)
    weighting = Weighting(task_weights.to(G))
    G = (weighting.gramian(sums.gramian) / scale**2).cpu()  # (K, K), the only copy to the host
    finite = bool(G.isfinite().all())
    context = _context(present, tasks)
    if finite and rule.sees == "jacobian":
        _refuse_several(ranks)
        J = gradients.jacobian()  # (k, F)
        J_weighted = weighting.matrix[gradients.indices, None].to(J) * (J / scale)
        direction = scale * _direction(rule, J_weighted, context, memory).to(J)
        return Merged(list(torch.split(direction, gradients.lengths)), present, None, G)
    weights = G.new_full((len(G),), 0.0 if finite else math.nan)  # (K,)
    if finite and rule.sees == "gramian":
        weights[present] = _solved(rule, G[present][:, present], context, memory).to(weights)
    local = (weighting.matrix * weights.to(weighting.matrix))[gradients.indices]
    return Merged(gradients.combined(local), present, weights, G)


def _solved(rule: GradientBalancer, gramian: Gramian, context: Context, memory: PassMemory) -> Weights:
    """Return the weights of a rule that sees the Gramian of the present tasks. Shape (k, k) -> (k,)."""
    with _repeating(rule, memory):
        weights = rule.reuse(context)
        return rule(gramian, context) if weights is None else weights


def _direction(rule: JacobianBalancer, jacobian: Jacobian, context: Context, memory: PassMemory) -> Direction:
    """Return the direction of a rule that sees the Jacobian. Shape (k, F) -> (F,)."""
    with _repeating(rule, memory):
        return rule(jacobian, context)


def _refuse_several(ranks: Ranks) -> None:
    if ranks.size > 1:
        raise RuntimeError(
            "A gradient balancer that sees the Jacobian balances the gradients of one process, but torch.distributed "
            f"runs {ranks.size}. Use a gradient balancer that sees the Gramian."
        )


def _context(present: list[int], tasks: Sequence[str]) -> Context:
    indices = torch.tensor(present, dtype=torch.int64, device="cpu")
    return Context(indices, len(tasks), tasks=tuple(tasks[k] for k in present))


@contextmanager
def _repeating(rule: GradientBalancer | JacobianBalancer, memory: PassMemory) -> Iterator[None]:
    """Start the rule from its state before the first pass over this graph; only that pass may change the state."""
    if not rule.learns:
        yield
        return
    module = cast("nn.Module", rule)
    state: dict[str, Any] = copy.deepcopy(module.state_dict())
    if memory.rule_state is None:
        with restored_on_error(module):
            yield
        memory.rule_state = state
        return
    if state:
        module.load_state_dict(memory.rule_state)
    try:
        yield
    finally:
        if state:
            module.load_state_dict(state)
