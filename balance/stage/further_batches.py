"""Inner products of the task gradients of two further batches, for rules whose published form needs independent samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.partition import partition_graph
from ..engine.passes import LossOutputs
from .arguments import read_losses
from .ordinary_backward import NotFiniteError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..engine.engine import Engine
    from ..rules.protocol import GradientBalancer, JacobianBalancer
    from ..types import Gramian, Jacobian, Source
    from .arguments import NanPolicy, StepArguments, StepLosses, ZeroPolicy


def check_further(
    given: StepArguments,
    rule: GradientBalancer | JacobianBalancer | None,
    source: Source,
    *,
    num_ranks: int,
    is_collecting: bool,
) -> None:
    """Check that a step can use further batches, if it has some.

    Args:
        given: The arguments of the step.
        rule: The gradient balancer.
        source: Tensors on which conflict is measured.
        num_ranks: Number of processes that train together.
        is_collecting: Whether micro-batches are collected.

    Raises:
        ValueError: If it cannot.
    """
    if given.further is None:
        return
    if not isinstance(given.further, list | tuple) or len(given.further) != 2:
        raise ValueError(f"further must be a pair, the losses of two further batches, but got {type(given.further).__name__}.")
    if rule is None or rule.sees == "jacobian" or not rule.uses_cross:
        raise ValueError("further is for gradient balancers that use several batches (sdmgrad, modo). Leave it out.")
    reasons = {
        'source="features"': source == "features",
        "several processes": num_ranks > 1,
        "collect()": is_collecting,
    }
    if unavailable := [name for name, is_given in reasons.items() if is_given]:
        raise ValueError(f"further cannot be combined with {' and '.join(unavailable)}. Leave it out.")


def cross_gramian(
    given: StepArguments,
    step: StepLosses,
    tasks: tuple[str, ...],
    policies: tuple[NanPolicy, ZeroPolicy],
    parameters: Sequence[Tensor],
    engine: Engine,
    *,
    retain_graph: bool,
) -> Gramian | None:
    """Return the inner products of the gradients on the second batch with those on the third.

    Args:
        given: The arguments of the step, checked.
        step: The losses of the first batch.
        tasks: Names of all tasks.
        policies: Meanings of losses of NaN and of zero.
        parameters: Parameters of the balancer.
        engine: Computation of the task gradients.
        retain_graph: Retain the graphs.

    Returns:
        Entry (i, j) is of task i on the second batch and task j on the third. Shape (K, K), float64, on the host. None if the
        step has no further batches.

    Raises:
        ValueError: If a batch lacks a task of the step.
        NotFiniteError: If a loss or a gradient is not finite.
    """
    if given.further is None:
        return None
    second, third = (
        _jacobian(given, step, read_losses(losses, tasks, *policies), parameters, engine, retain_graph=retain_graph)
        for losses in given.further
    )
    return (second.double() @ third.double().T).cpu()


def _jacobian(
    given: StepArguments,
    step: StepLosses,
    batch: StepLosses,
    parameters: Sequence[Tensor],
    engine: Engine,
    *,
    retain_graph: bool,
) -> Jacobian:
    """Return the gradients of one further batch, of the tasks of the step. Shape (K, P)."""
    if missing := [task for task in step.tasks if task not in batch.tasks]:
        raise ValueError(f"Every batch in further must have the tasks {step.tasks}, but one lacks {', '.join(missing)}.")
    if bad := batch.not_finite():
        raise NotFiniteError(f"Losses must be finite, but a further batch has {bad}. Look at the data and the learning rate.")
    roots = [batch.roots[batch.tasks.index(task)] for task in step.tasks]
    parts = partition_graph("parameters", roots, given.shared, None, given.measure, parameters)._replace(heads=[])
    gradients = engine.measure(LossOutputs(roots, batch.one), parts, as_matrix=True, retain_graph=retain_graph)
    jacobian = gradients.jacobian
    assert jacobian is not None
    if not jacobian.isfinite().all():
        raise NotFiniteError("Gradients must be finite, but a further batch has others. Look at the learning rate.")
    return jacobian
