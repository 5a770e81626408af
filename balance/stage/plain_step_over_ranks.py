"""Steps without a gradient balancer over several ranks: one backward pass, which the wrapper of the model reduces."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch

from ..distributed.sharding import is_distributed_tensor, local_shard
from ..distributed.wrappers import is_inside_forward
from ..engine.accumulate import (
    LeafGradient,
    accumulate,
    accumulate_reduced,
    are_finite,
    leaf_gradients,
    surrogate_loss,
    without_hooks,
)
from ..engine.graph import leaves
from ..engine.over_ranks import sum_gradients
from ..engine.passes import LossOutputs, weighted_pass
from .loss_weighting import weighted_step
from .plain_step import Outcome, extra_gradients, plain_report, seed_of, task_passes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..distributed.ranks import Ranks
    from ..distributed.wrappers import Model
    from ..engine.graph import Root
    from ..rules.protocol import LossBalancer
    from .arguments import StepArguments
    from .over_ranks import Agreed
    from .plain_step import Seed

_HASHES = 1 << 20  # squares of so small hashes, and their sums over ranks, are exact in float64


def take_plain_step_over_ranks(rule: LossBalancer, agreed: Agreed, given: StepArguments, ranks: Ranks) -> Outcome:
    """Take a step whose weights come from the mean losses over all ranks.

    The wrapper of the model reduces the gradients in one backward pass, as in a step without a balancer. Without a wrapper,
    with losses of half precision, or if the wrapper does not expect this backward pass, the gradients are summed over ranks
    here.

    Args:
        rule: The loss balancer.
        agreed: The step of all ranks.
        given: The arguments of the step. Its extra loss is averaged over ranks.
        ranks: The ranks.

    Returns:
        The record of the step, and whether the scaler will skip the step.

    Raises:
        RuntimeError: If the wrapper would wait for parameters that a rank does not reach, or does not reduce.
    """
    step, scaler, factor, extra = agreed.step, given.enabled_scaler, given.factor, given.extra
    weighted = weighted_step(rule, step)
    weights = (factor * weighted.loss_weights).tolist()
    seed = seed_of(step, scaler)
    own = weighted.parameter_pairs(factor * seed.scale)
    if agreed.model.is_sharded or (agreed.model.is_wrapped and not agreed.is_half and _is_expected(agreed.model, given)):
        _run_wrapped_pass(agreed, weights, seed, factor, extra, ranks)
        accumulate(own)
    else:
        accumulate_reduced([*_summed_gradients(agreed, weights, seed, factor, extra, ranks), *own])
    skipped = False
    if scaler is not None and (rule.learns or own):  # all ranks must restore the state of the rule, or none
        trained = [*agreed.model.parameters, *(parameter for parameter, _ in own)]
        gradients = [
            local_shard(leaf.grad) if is_distributed_tensor(leaf.grad) else leaf.grad
            for leaf in trained
            if leaf.grad is not None
        ]
        bad = torch.tensor(float(not are_finite(gradients)), dtype=torch.float64, device="cpu")
        skipped = bool(ranks.sum(bad))
    return Outcome(plain_report(weighted, step), skipped)


def _is_expected(model: Model, given: StepArguments) -> bool:
    """Return whether the wrappers reduce the gradients of this backward pass.

    While the forward pass of a wrapper runs, its hooks may be off. After it, a wrapper that looks for unused parameters, or
    counts the uses of each, has only seen the output of the forward pass. A loss whose backward pass is a step has no graph
    in which to find the parameters.
    """
    if is_inside_forward():
        return False
    return not (given.in_forward and any(wrapper.find_unused_parameters or wrapper.static_graph for wrapper in model.wrappers))


def _summed_gradients(
    agreed: Agreed, weights: Sequence[float], seed: Seed, factor: float, extra: Tensor | None, ranks: Ranks
) -> list[LeafGradient]:
    """Return the gradients of the weighted losses, summed over ranks without a wrapper."""
    step, parameters = agreed.step, agreed.model.parameters
    extras = dict(_by_id(extra_gradients(extra, factor / ranks.size, seed)))
    if agreed.is_half:
        own = dict(_by_id(task_passes(step, seed, parameters).weighted_sums(weights)))
    else:
        outputs = LossOutputs(step.roots, seed.gradient, step.shares)
        with without_hooks(parameters):
            own = dict(_by_id(leaf_gradients(parameters, weighted_pass(outputs, weights, parameters))))
    gradients = [_sum(own.get(id(p)), extras.get(id(p))) for p in parameters]
    return leaf_gradients(parameters, sum_gradients(ranks, parameters, gradients))


def _by_id(pairs: Sequence[LeafGradient]) -> list[tuple[int, Tensor]]:
    return [(id(leaf), gradient) for leaf, gradient in pairs]


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _run_wrapped_pass(
    agreed: Agreed, weights: Sequence[float], seed: Seed, factor: float, extra: Tensor | None, ranks: Ranks
) -> None:
    """Run one ordinary backward pass, whose gradients the wrapper averages over ranks: hence the number of ranks."""
    step, model = agreed.step, agreed.model
    outputs = LossOutputs(step.roots, seed.gradient, step.shares)
    roots, values = outputs.weighted_cotangents([ranks.size * weight for weight in weights])
    if extra is not None:
        roots.append(extra)
        values.append(torch.full_like(extra.detach(), factor * seed.scale))
    missing = _missing(agreed, [*step.roots, extra])
    before = [(leaf, leaf.grad) for leaf in missing]
    zeros = surrogate_loss([(leaf, torch.zeros_like(leaf)) for leaf in missing])
    if zeros is not None:
        roots.append(zeros)
        values.append(torch.ones_like(zeros))
    if roots:
        torch.autograd.backward(roots, values)  # type: ignore[arg-type]
    if agreed.num_unreached:
        _restore_unreached(model, missing, before, ranks)
    _check_reduction(model, ranks)


def _missing(agreed: Agreed, roots: Sequence[Root | None]) -> list[Tensor]:
    """Return parameters that get a zero gradient, because the wrapper waits for them and this rank does not reach them."""
    model = agreed.model
    if not agreed.num_unreached:
        return []
    if any(wrapper.static_graph for wrapper in model.wrappers):
        if not agreed.is_even or len(agreed.step.tasks) < agreed.step.num_tasks:
            raise RuntimeError(
                "With static_graph=True all tasks must be present at every step and on every rank, but some are absent. Use "
                "DistributedDataParallel without that option."
            )
        return []
    if any(wrapper.find_unused_parameters for wrapper in model.wrappers):
        if agreed.has_idle_rank:
            raise RuntimeError(
                "A rank has no loss at all, and with find_unused_parameters=True all other ranks would wait for it. Leave "
                "that option out, which a balancer does not need."
            )
        return []
    reached = {id(leaf) for leaf in leaves(roots)}
    return [parameter for parameter in model.parameters if id(parameter) not in reached]


def _restore_unreached(
    model: Model, missing: Sequence[Tensor], before: Sequence[tuple[Tensor, Tensor | None]], ranks: Ranks
) -> None:
    """Set ``.grad`` of parameters that no rank reaches back, so that no optimizer decays them."""
    ids = {id(parameter) for parameter in missing}
    reached = torch.tensor([id(p) not in ids for p in model.parameters], dtype=torch.float64, device="cpu")
    counts = dict(zip(map(id, model.parameters), ranks.sum(reached).tolist(), strict=True))
    for parameter, gradient in before:
        if not counts[id(parameter)]:
            parameter.grad = gradient


def _check_reduction(model: Model, ranks: Ranks) -> None:
    """Check once that the wrapper has reduced the gradients: it does so only if it has run the forward pass.

    Raises:
        RuntimeError: If the gradients of two ranks differ.
    """
    if (
        ranks.has_checked_reduction
        or model.is_sharded
        or not all(wrapper.require_backward_grad_sync for wrapper in model.wrappers)
    ):
        return
    ranks.has_checked_reduction = True
    samples = [p.grad.to_dense().flatten()[:1].double().cpu() for p in model.parameters if p.grad is not None and p.numel()]
    number = zlib.crc32(torch.cat(samples).numpy().tobytes()) % _HASHES if samples else 0
    total, squares = ranks.sum(torch.tensor([number, number**2], dtype=torch.float64, device="cpu")).tolist()
    if total**2 != ranks.size * squares:
        raise RuntimeError(
            "The gradients of the ranks differ after the backward pass, because the losses do not come from the forward pass "
            "of the wrapper. Call the DistributedDataParallel module, not the module inside of it."
        )
