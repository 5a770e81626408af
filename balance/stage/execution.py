"""Execution of one step: read the losses, agree with the other ranks, take the step, restore everything if it fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..distributed.sharding import is_distributed_tensor, sharded_parameters
from ..engine.accumulate import accumulate, accumulate_reduced, are_finite, leaf_gradients, merged_pairs
from ..engine.custom_functions import needs_ordinary_pass
from ..engine.fully_sharded import sharded_partition
from ..engine.graph import leaves
from ..engine.over_ranks import sum_gradients
from ..engine.partition import partition_graph, read_features, read_shared
from ..rules.snapshot import Snapshot, parameters_of
from .arguments import read_losses, require_present
from .delayed import not_finite_error
from .delayed_step import note_losses, take_delayed_step
from .further_batches import check_further, cross_gramian
from .loss_weighting import weighted_step
from .ordinary_backward import NotFiniteError, require_finite
from .over_ranks import agree
from .own_gradients import restore
from .owner import Owner, Prepared
from .plain_step import (
    Outcome,
    extra_gradients,
    leave_to_scaler,
    plain_report,
    seed_of,
    take_plain_step,
    without_autocast,
)
from .plain_step_over_ranks import take_plain_step_over_ranks
from .samples import read_sample_losses, require_one_process
from .step import BalancedStep

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from ..engine.accumulate import LeafGradient
    from ..engine.partition import Partition
    from ..rules.protocol import LossBalancer
    from .arguments import StepArguments, StepLosses
    from .over_ranks import Agreed
    from .plain_step import Seed


def prepare(owner: Owner, given: StepArguments) -> Prepared:
    """Read the arguments of a step, and agree on the step with the other ranks.

    Args:
        owner: The balancer.
        given: The arguments.

    Returns:
        The step.

    Raises:
        ValueError: If an argument is wrong, or no task is present.
        TypeError: If an argument has the wrong type.
        RuntimeError: If the graph cannot be walked once for each task, or the ranks have not the same parameters.
    """
    num_ranks = owner.ranks.size
    if given.further is not None:
        is_collecting = owner.collection is not None
        check_further(given, owner.gradient_balancer, owner.source, num_ranks=num_ranks, is_collecting=is_collecting)
    if owner.tasks:
        step = read_losses(given.losses, owner.tasks, owner.nan, owner.zero, given.counts)
    else:
        require_one_process(owner.ranks)
        step = read_sample_losses(given, owner.zero)
    parameters: list[Tensor] = [*parameters_of(owner)]
    parts = read_partition(owner, step, given, parameters)
    if num_ranks == 1:
        if not step.tasks:
            require_present(step, given.losses, owner.tasks)
        return Prepared(parameters, step, parts)
    agreed = agree(step, owner.tasks, _leaves(step, parts, given), parameters, owner.ranks, extra=given.extra is not None)
    require_present(agreed.step, given.losses, owner.tasks)
    if parts is not None:
        parts = _over_ranks(owner, parts, agreed, parameters)
    return Prepared(parameters, agreed.step, parts, agreed)


def read_partition(owner: Owner, step: StepLosses, given: StepArguments, parameters: Sequence[Tensor]) -> Partition | None:
    """Return shared parameters, heads and features, checked; None without a gradient balancer.

    Args:
        owner: The balancer.
        step: The losses of this rank.
        given: The arguments of the step.
        parameters: Parameters of the balancer.

    Raises:
        ValueError: If an argument is wrong.
    """
    if owner.gradient_balancer is None:
        _check_unused(given)
        return None
    roots = [*step.starts, *step.idle.values()]
    shared = [p for p in given.shared if isinstance(p, torch.Tensor)] if isinstance(given.shared, list) else []
    if (sharded := sharded_partition(roots, shared, parameters)) is not None:
        _check_sharded(owner, given)
        return sharded
    if owner.metric is not None and given.measure is not None:
        raise ValueError("measure cannot be combined with a metric, since lengths in it need all shared parameters. Use one.")
    parts = partition_graph(owner.source, step.starts, given.shared, given.features, given.measure, parameters)
    if owner.gradient_balancer.sees == "jacobian":
        if given.measure is not None:
            raise ValueError("measure is for rules that give weights, but this one sees the Jacobian and gives a direction.")
        if owner.source == "features" and not parts.features:
            raise ValueError(
                "A rule that sees the Jacobian of the features needs every path from a loss to a shared parameter to go "
                "through one of them, and none of them to be computed from another, but that is not so here."
            )
    return parts


def execute(owner: Owner, given: StepArguments, prepared: Prepared, *, is_trial: bool = False) -> Outcome:
    """Take a step; if it fails or the scaler will skip it, ``.grad`` and the state of all rules are as before.

    Args:
        owner: The balancer.
        given: The arguments.
        prepared: The step.
        is_trial: Only compute the weights. Nothing changes.

    Returns:
        The record of the step, and whether the scaler will skip it.

    Raises:
        ValueError: If a loss is not finite, or does not require a gradient.
    """
    outcome = _checked_step(owner, given, prepared, is_trial=is_trial)
    if not is_trial:
        owner.own_gradients.remember(prepared.parameters, skipped=outcome.skipped)
    return outcome


def _checked_step(owner: Owner, given: StepArguments, prepared: Prepared, *, is_trial: bool) -> Outcome:
    step, delays = prepared.step, not is_trial and _delays(owner, given, prepared)
    if not delays and step.not_finite():
        if given.enabled_scaler is None or is_trial:
            raise not_finite_error(step.tasks, step.losses.tolist())
        return _left_to_scaler(given, prepared)
    if prepared.agreed is None and prepared.collected is None and not step.losses.requires_grad:
        raise ValueError("No loss requires a gradient. Compute the losses with gradients enabled and do not detach them.")
    return take_delayed_step(owner, given, prepared) if delays else _take(owner, given, prepared, is_trial=is_trial)


def _delays(owner: Owner, given: StepArguments, prepared: Prepared) -> bool:
    """Return whether the host reads the checks of a step one call later."""
    step = prepared.step
    if not owner.delays(step.losses) or prepared.collected is not None or step.is_half:
        return False
    return given.enabled_scaler is None or not owner.loss_balancer.learns


def _take(owner: Owner, given: StepArguments, prepared: Prepared, *, is_trial: bool) -> Outcome:
    step, rule = prepared.step, owner.loss_balancer
    state = Snapshot(rule, owner.gradient_balancer) if rule.learns or owner.gradient_balancer is not None else None
    stretch = None if owner.gradient_balancer is None else owner.stretch.clone()
    gradients = owner.own_gradients.clear_used(prepared.parameters)
    try:
        with without_autocast(step.losses.device):  # half precision is too coarse for the direction
            outcome = _outcome(owner, rule, given, prepared, is_trial=is_trial)
    except BaseException as error:
        _restore(owner, state, stretch, gradients)
        if given.enabled_scaler is None or is_trial or not isinstance(error, NotFiniteError):
            raise
        return _left_to_scaler(given, prepared)
    if is_trial:
        _restore(owner, state, stretch, gradients)
    elif outcome.skipped:  # no rule must learn from such a step
        _restore(owner, state, None, [])
    else:
        owner.reminders.after_step(rule, prepared.parameters)
        if rule.uses_epochs:
            note_losses(owner, step, step.host)
    return outcome


def _restore(
    owner: Owner, state: Snapshot | None, stretch: Tensor | None, gradients: Sequence[tuple[Tensor, Tensor | None]]
) -> None:
    if state is not None:
        state.restore()
    if stretch is not None:
        owner.stretch.copy_(stretch)
    restore(gradients)


def _outcome(owner: Owner, rule: LossBalancer, given: StepArguments, prepared: Prepared, *, is_trial: bool) -> Outcome:
    _, step, parts, agreed, collected, extras = prepared
    scaler, factor, extra = given.enabled_scaler, given.factor, given.extra
    if owner.gradient_balancer is None or parts is None:
        if is_trial:
            return _trial_of_losses(owner, step)
        if collected is not None:
            return _take_collected(owner, given, prepared)
        if agreed is not None:
            return take_plain_step_over_ranks(rule, agreed, given, owner.ranks)
        return take_plain_step(rule, step, scaler, factor, extra)
    seed = seed_of(step, scaler)
    if collected is None:
        extras = _extra_pairs(owner, given, prepared, seed)
    is_sharded = any(map(is_distributed_tensor, parts.trunk))
    policies = (owner.nan, owner.zero)
    cross = cross_gramian(given, step, owner.tasks, policies, prepared.parameters, owner.engine, retain_graph=is_trial)
    whole = BalancedStep(
        owner, owner.gradient_balancer, step, parts, seed, factor, list(extras), collected, is_trial, is_sharded, cross
    )
    return Outcome(whole.run())


def _trial_of_losses(owner: Owner, step: StepLosses) -> Outcome:
    """Return the weights of a step without a gradient balancer."""
    return Outcome(plain_report(weighted_step(owner.loss_balancer, step), step))


def _take_collected(owner: Owner, given: StepArguments, prepared: Prepared) -> Outcome:
    """Take a step without a gradient balancer, given the gradients of each task."""
    step, collected = prepared.step, prepared.collected
    assert collected is not None
    weighted = weighted_step(owner.loss_balancer, step)
    weights = (given.factor * weighted.loss_weights).tolist()
    own = weighted.parameter_pairs(given.factor * seed_of(step, given.enabled_scaler).scale)
    pairs = [*merged_pairs(collected.head_sums(weights), prepared.extras), *own]
    require_finite(pairs, step.tasks)
    (accumulate_reduced if owner.ranks.size > 1 else accumulate)(pairs)
    return Outcome(plain_report(weighted, step))


def _extra_pairs(owner: Owner, given: StepArguments, prepared: Prepared, seed: Seed) -> list[LeafGradient]:
    """Return the gradients of the extra loss, averaged over ranks, with all factors."""
    agreed = prepared.agreed
    if agreed is None:
        pairs = extra_gradients(given.extra, given.factor, seed)
    elif agreed.has_extra:
        parameters = agreed.model.parameters
        local = {id(leaf): g for leaf, g in extra_gradients(given.extra, given.factor / owner.ranks.size, seed)}
        sums = sum_gradients(owner.ranks, parameters, [local.get(id(parameter)) for parameter in parameters])
        pairs = leaf_gradients(parameters, sums)
    else:
        pairs = []
    if not are_finite([gradient for _, gradient in pairs]):
        raise NotFiniteError("The gradients of extra must be finite, but are not. Look at the learning rate.")
    return pairs


def _left_to_scaler(given: StepArguments, prepared: Prepared) -> Outcome:
    scaler = given.enabled_scaler
    assert scaler is not None
    leaves_of_model = _leaves(prepared.step, prepared.parts, given)
    if prepared.agreed is not None:
        leaves_of_model = prepared.agreed.model.parameters
    return leave_to_scaler(prepared.step, scaler, [*leaves_of_model, *prepared.parameters])


def _check_sharded(owner: Owner, given: StepArguments) -> None:
    """Check the choices of a step whose parameters FSDP2 shards.

    Raises:
        RuntimeError: If a choice is not available.
    """
    rule = owner.gradient_balancer
    reasons = {
        'source="features"': owner.source == "features",
        "a rule that sees the Jacobian": rule is not None and rule.sees == "jacobian",
        "measure=": given.measure is not None,
        "extra=": given.extra is not None,
        "collect()": owner.collection is not None,
        "shared=None": not given.shared,
    }
    if unavailable := [name for name, is_given in reasons.items() if is_given]:
        raise RuntimeError(
            f"With sharded parameters (FSDP2, DTensor) {' and '.join(unavailable)} cannot be combined with a gradient "
            'balancer. Available are source="parameters" with shared= and a rule that sees the Gramian, gradient=None, and '
            "balance.Splitter inside of the model."
        )


def _leaves(step: StepLosses, parts: Partition | None, given: StepArguments) -> list[Tensor]:
    """Return the leaf tensors that a step of this rank can reach, and the shared parameters."""
    if parts is None:
        shared = [] if given.shared is None else read_shared(given.shared, measured=False)
        idle = leaves(step.idle.values())
        reached = [*leaves([*step.starts, given.extra]), *shared, *(idle if sharded_parameters(idle) else ())]
    else:
        reached = [*parts.trunk, *parts.heads, *([] if given.extra is None else leaves([given.extra]))]
    return list({id(leaf): leaf for leaf in reached if leaf.requires_grad}.values())


def _over_ranks(owner: Owner, parts: Partition, agreed: Agreed, parameters: Sequence[Tensor]) -> Partition:
    """Return a partition with the heads of all ranks.

    Raises:
        RuntimeError: If the graph needs a backward pass that the wrapper would take part in.
    """
    rule = owner.gradient_balancer
    if parts.source == "features" and rule is not None and rule.sees == "jacobian":
        raise RuntimeError(
            "A rule that sees the Jacobian of the features needs the samples of all ranks in one place, but there are "
            f'{owner.ranks.size} ranks. Use source="parameters", or a rule that sees the Gramian.'
        )
    if parts.source == "features" and needs_ordinary_pass(parts.lower_graph.functions):
        raise RuntimeError(
            "Over several ranks the part below the features must consist of ordinary operations, but it contains a reentrant "
            "checkpoint or a custom function. Use use_reentrant=False, or balance.Splitter."
        )
    if agreed.model.is_sharded:
        return parts
    is_static = any(wrapper.static_graph for wrapper in agreed.model.wrappers)
    if is_static and any(type(node).__name__ == "_DDPSinkBackward" for node in parts.functions):
        raise RuntimeError(
            "A gradient balancer cannot use the first forward pass of DistributedDataParallel with static_graph=True, which "
            "expects one ordinary backward pass. Call the module inside of it (model.module), or leave static_graph out."
        )
    return parts._replace(heads=agreed.model.heads([*parts.trunk, *parameters]))


def _check_unused(given: StepArguments) -> None:
    """Check arguments that only a gradient balancer uses, so that a gradient balancer added later raises no new error."""
    for name, parameters in (("shared", given.shared), ("measure", given.measure)):
        if parameters is not None and not _are_leaves(parameters):
            read_shared(parameters, name, measured=False)
    if given.features is not None:
        read_features(given.features)


def _are_leaves(parameters: Iterable[Tensor]) -> bool:
    """Return whether parameters are a list that `read_shared` would not refuse; faster than reading it."""
    if not isinstance(parameters, list) or not parameters:
        return False
    return all(isinstance(parameter, torch.Tensor) and parameter.is_leaf for parameter in parameters)
