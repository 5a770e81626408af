"""Steps with one loss per sample: the samples of a batch are the tasks, and have no names that last."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..engine.graph import unstacked_roots
from ..rules.options import parameters
from ..rules.registry import gradient_balancers, loss_balancers
from ..rules.switch import Switch
from .arguments import StepLosses

if TYPE_CHECKING:
    from ..distributed.ranks import Ranks
    from ..rules.protocol import LossBalancer
    from ..rules.registry import Registry
    from .arguments import NanPolicy, StepArguments, ZeroPolicy

_HINT = "With tasks=None every sample is a task, and the next batch has other samples"


def check_sample_rules(loss: object, gradient: object, weights: object) -> None:
    """Check that rules keep no state by task, where the tasks are the samples of a batch.

    Args:
        loss: The loss balancer, as the user gave it.
        gradient: The gradient balancer, as the user gave it.
        weights: Priorities of the tasks, as the user gave them.

    Raises:
        ValueError: If a rule keeps state by task, or there are priorities.
    """
    if weights is not None:
        raise ValueError(f"{_HINT}, so that weights={weights!r} belong to no task. Multiply the losses instead.")
    for rule in loss if isinstance(loss, list | tuple) else [loss]:
        _refuse_state(loss_balancers, rule)
    _refuse_state(gradient_balancers, gradient)


def check_sample_choices(rule: LossBalancer, nan: NanPolicy, ranks: Ranks) -> None:
    """Check the choices of a balancer with one loss per sample.

    Args:
        rule: The loss balancer.
        nan: Meaning of a loss of NaN.
        ranks: Processes that train together.

    Raises:
        ValueError: If a choice needs tasks that last.
        RuntimeError: If there are several processes.
    """
    if rule.needs_observation or rule.needs_epochs or rule.needs_validation:
        raise ValueError(f"{_HINT}, but the loss balancer learns from the losses of lasting tasks. Use a rule without state.")
    if nan == "absent":
        raise ValueError(f'{_HINT}, but nan="absent" needs losses by name. Leave samples without a label out of the batch.')
    require_one_process(ranks)


def require_one_process(ranks: Ranks) -> None:
    """Check that only one process trains the model.

    Raises:
        RuntimeError: If there are several.
    """
    if ranks.size > 1:
        raise RuntimeError(f"{_HINT}, also on each of the {ranks.size} processes. Train in one process, or name the tasks.")


def _refuse_state(registry: Registry, rule: object) -> None:
    name = f"'{rule}'" if isinstance(rule, str) else type(rule).__name__
    if isinstance(rule, Switch):
        has_state = True
    elif isinstance(rule, str):
        has_state = "num_tasks" in parameters(registry.method(rule).rule)
    elif isinstance(rule, nn.Module):
        state = (*rule.parameters(), *rule.buffers())
        has_state = "num_tasks" in parameters(type(rule)) or any(tensor.numel() > 1 for tensor in state)
    else:
        return
    if has_state:
        raise ValueError(
            f"{_HINT}, but the {registry.kind} {name} keeps state by task. Use a rule without state, or name tasks."
        )


@lru_cache(maxsize=8)
def sample_names(count: int) -> tuple[str, ...]:
    """Return the names of the samples of a batch: "0", "1", ..."""
    return tuple(map(str, range(count)))


def read_sample_losses(given: StepArguments, zero: ZeroPolicy) -> StepLosses:
    """Return the losses of one step, given as a vector with one loss per sample.

    Args:
        given: The arguments of the step.
        zero: ``"absent"``: a sample whose loss is exactly zero is absent.

    Returns:
        The losses; possibly of no sample. Rules see a step at which all samples are present.

    Raises:
        TypeError: If the losses are no tensor of floats.
        ValueError: If they are no vector, or an argument needs tasks that last.
    """
    losses = given.losses
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        value = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"losses must be a tensor of floats with one loss per sample, but got {value}. Use reduction='none'.")
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"losses must have shape (B,) with B >= 1, but got {tuple(losses.shape)}. Use reduction='none'.")
    if given.further is not None:
        raise ValueError(f"{_HINT}, so that further batches have no losses of the same tasks. Leave further out.")
    if given.counts is not None:
        raise ValueError(f"{_HINT}, but counts are numbers of samples by task. Leave counts out.")
    names = sample_names(len(losses))
    present = losses.detach().cpu().nonzero().flatten() if zero == "absent" else None
    if present is None or len(present) == len(losses):
        return _step(losses, None, names)
    return _step(losses, present, tuple(names[i] for i in present.tolist()))


def _step(losses: Tensor, present: Tensor | None, names: tuple[str, ...]) -> StepLosses:
    """Return a step of the present samples, given by their indices; None: all."""
    stacked = unstacked_roots(losses)
    chosen = range(len(losses)) if present is None else present.tolist()
    roots: list[Any] = [losses] * len(names) if stacked is None else [stacked[i] for i in chosen]
    values = losses.view_as(losses) if present is None else losses[present.to(losses.device)]
    vector = losses if stacked is None else None
    return StepLosses(names, len(names), values, known={"roots": roots}, vector=vector, present=present)
