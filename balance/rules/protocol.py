"""Contract between a rule and the code that calls it.

An author writes a rule in the simplest form: a function of one tensor. A rule may also have keywords and methods:

    present=      indices of the tasks of this step; passed only if tasks are absent
    losses=       gradient balancers: the raw losses of these tasks, detached
    cross=        gradient balancers: inner products of the gradients of these tasks on two further batches
    observe(losses), end_epoch(mean_losses)      loss balancers that learn between steps
    observe_validation(losses)                   loss balancers that learn from validation data
    stays_on_device                              loss balancers whose calls, but for observe_validation, never wait for a device
    reuse(present)                               gradient balancers that use weights of earlier steps

`adapt_loss_balancer` and `adapt_gradient_balancer` read that form once, when a stage is built. All other code calls rules
through the protocols `LossBalancer`, `GradientBalancer` and `JacobianBalancer`.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import nn

from .context import Context, TaskError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..types import Direction, Gramian, Heads, Jacobian, Losses, Sees, WeightedLosses, Weights


class LossBalancer(Protocol):
    """A rule that maps losses to weighted losses.

    Attributes:
        observes: Whether the rule has to see the raw losses. In a chain it must be the first.
        needs_observation: Whether `observe` must be called after every optimizer step.
        needs_epochs: Whether `end_epoch` must be called after every epoch.
        needs_validation: Whether `observe_validation` must be called every few steps.
        learns: Whether steps can change the rule's state.
        uses_epochs: Whether `end_epoch` has an effect.
        stays_on_device: Whether the rule computes on the device of the losses while its checks are delayed, see
            ``balance.rules.checks``. Its buffers of floats follow the losses; the rest of its state stays on the host.
    """

    @property
    def learns(self) -> bool: ...  # noqa: D102 - see the class
    @property
    def uses_epochs(self) -> bool: ...  # noqa: D102
    @property
    def stays_on_device(self) -> bool: ...  # noqa: D102
    @property
    def observes(self) -> bool: ...  # noqa: D102
    @property
    def needs_observation(self) -> bool: ...  # noqa: D102
    @property
    def needs_epochs(self) -> bool: ...  # noqa: D102
    @property
    def needs_validation(self) -> bool: ...  # noqa: D102

    def __call__(self, losses: Losses, context: Context) -> WeightedLosses:
        """Return the weighted losses of the present tasks, differentiable. Shape (K,) -> (K,)."""

    def check(self, context: Context) -> None:
        """Raise an error if the rule cannot be applied without the absent tasks, before any state changes."""

    def observe(self, losses: Losses, context: Context) -> None:
        """Learn from the losses of the same batch after the optimizer step. Shape (K,)."""

    def observe_validation(self, losses: Losses, context: Context) -> None:
        """Learn from the losses of a batch of validation data. Shape (K,)."""

    def end_epoch(self, mean_losses: Tensor) -> None:
        """Learn from the mean raw losses of an epoch, NaN for tasks that were never present. Shape (all tasks,)."""


class GradientBalancer(Protocol):
    """A rule that maps a Gramian to weights.

    Attributes:
        sees: The constant ``"gramian"``.
        heads: Treatment of task-specific heads in the method's paper code.
        fixed_length: Whether the length of the direction does not depend on the lengths of the gradients.
        reuses: Whether some steps use the weights of earlier steps.
        uses_losses: Whether the formula contains the losses.
        uses_cross: Whether the formula contains the inner products of two further batches.
        learns: Whether steps can change the rule's state.
    """

    @property
    def sees(self) -> Literal["gramian"]: ...  # noqa: D102 - see the class
    @property
    def heads(self) -> Heads: ...  # noqa: D102
    @property
    def fixed_length(self) -> bool: ...  # noqa: D102
    @property
    def reuses(self) -> bool: ...  # noqa: D102
    @property
    def uses_losses(self) -> bool: ...  # noqa: D102
    @property
    def uses_cross(self) -> bool: ...  # noqa: D102
    @property
    def learns(self) -> bool: ...  # noqa: D102

    def __call__(self, gramian: Gramian, context: Context) -> Weights:
        """Return one finite weight for each present task, detached. Shape (K, K) -> (K,)."""

    def reuse(self, context: Context) -> Weights | None:
        """Return the weights of an earlier step for this step, or None if it must compute a Gramian. Shape (K,).

        The stage calls this method exactly once before each step.
        """


class JacobianBalancer(Protocol):
    """A rule that maps a Jacobian to a direction, for methods that must see every coordinate.

    Attributes:
        sees: The constant ``"jacobian"``.
        heads: Treatment of task-specific heads; such a rule has no weights for them.
        fixed_length: As in `GradientBalancer`.
        uses_losses: As in `GradientBalancer`.
        learns: As in `GradientBalancer`.
    """

    @property
    def sees(self) -> Literal["jacobian"]: ...  # noqa: D102 - see the class
    @property
    def heads(self) -> Heads: ...  # noqa: D102
    @property
    def fixed_length(self) -> bool: ...  # noqa: D102
    @property
    def uses_losses(self) -> bool: ...  # noqa: D102
    @property
    def learns(self) -> bool: ...  # noqa: D102

    def __call__(self, jacobian: Jacobian, context: Context) -> Direction:
        """Return a finite direction, detached. Shape (K, P) -> (P,)."""


def adapt_loss_balancer(rule: Callable[..., WeightedLosses]) -> LossBalancer:
    """Return a rule in its author's form as a `LossBalancer`; an adapted rule is returned unchanged."""
    return rule if isinstance(rule, AdaptedLossBalancer) else AdaptedLossBalancer(rule)


def adapt_gradient_balancer(
    rule: Callable[..., Tensor], sees: Sees = "gramian", heads: Heads | None = None, *, fixed_length: bool | None = None
) -> GradientBalancer | JacobianBalancer:
    """Return a rule in its author's form as a `GradientBalancer` or `JacobianBalancer`.

    Args:
        rule: The rule; an adapted rule is returned unchanged.
        sees: Input of the rule.
        heads: Treatment of heads; None: the rule's attribute ``heads``, or ``"unweighted"``.
        fixed_length: Whether the length of the direction does not depend on the lengths of the gradients; None: the
            rule's attribute ``fixed_length``, or False.
    """
    if isinstance(rule, AdaptedGradientBalancer | AdaptedJacobianBalancer):
        return rule
    if sees == "gramian":
        return AdaptedGradientBalancer(rule, heads, fixed_length=fixed_length)
    heads = heads or getattr(rule, "heads", None) or "unweighted"
    fixed_length = bool(getattr(rule, "fixed_length", False) if fixed_length is None else fixed_length)
    return AdaptedJacobianBalancer(rule, heads, fixed_length=fixed_length)


def try_out(rule: GradientBalancer, num_tasks: int) -> None:
    """Call a stateless rule once, so that it refuses options out of range when it is built and not at the first step."""
    if not rule.learns:
        losses = torch.ones(num_tasks, dtype=torch.float64, device="cpu")
        rule(torch.eye(num_tasks, dtype=torch.float64, device="cpu"), Context.of_all(num_tasks, losses))


class _Adapted(nn.Module):
    """A rule in its author's form, with the keywords that it takes.

    Attributes:
        rule: The rule as its author wrote it, with its state.
    """

    rule: Callable[..., Tensor]

    def __init__(self, rule: Callable[..., Tensor]) -> None:
        super().__init__()
        self.rule = rule
        self._keywords = _keywords(rule.forward if isinstance(rule, nn.Module) else rule)

    @property
    def learns(self) -> bool:
        """True if steps can change the rule's state."""
        return isinstance(self.rule, nn.Module)

    def _call(self, data: Tensor, context: Context, **keywords: Tensor) -> Any:
        """Return the result of the rule, called with the keywords that it takes.

        Raises:
            ValueError: If tasks are absent and the rule keeps state by task without a keyword ``present``. Also if a value
                of a task lies outside the rule's domain; the message names the task.
            TaskError: For such a value where names of the tasks are not available.
        """
        if context.present is not None:
            keywords |= self._present(context)
        try:
            return self.rule(data, **keywords)
        except TaskError as error:
            if context.tasks is None:
                raise
            raise ValueError(error.naming(context.tasks[error.task])) from None

    def _losses(self, context: Context) -> dict[str, Tensor]:
        return {} if context.losses is None or "losses" not in self._keywords else {"losses": context.losses}

    def _present(self, context: Context) -> dict[str, Tensor]:
        if context.present is None:
            return {}
        if "present" in self._keywords:
            return {"present": context.present}
        self._refuse_absent_tasks(context)
        return {}

    def _refuse_absent_tasks(self, context: Context) -> None:
        if isinstance(self.rule, nn.Module) and any(True for s in (self.rule.parameters(), self.rule.buffers()) for _ in s):
            names = context.tasks or f"tasks {context.indices.tolist()}"
            raise ValueError(
                f"{type(self.rule).__name__} keeps state by task, so that all tasks must be present, but only {names} are "
                "present. Give its forward a keyword present=None, the indices of the present tasks."
            )


class AdaptedLossBalancer(_Adapted):
    """A loss balancer in its author's form, as a `LossBalancer`."""

    def __init__(self, rule: Callable[..., WeightedLosses]) -> None:
        super().__init__(rule)
        self.observes = hasattr(rule, "observe")
        self.needs_epochs = bool(getattr(rule, "needs_epochs", False))
        self.uses_epochs = bool(getattr(rule, "uses_epochs", hasattr(rule, "end_epoch")))
        self.observes_validation = hasattr(rule, "observe_validation")

    @property
    def learns(self) -> bool:
        """True if steps can change the rule's state."""
        return isinstance(self.rule, nn.Module) or self.needs_observation

    @property
    def stays_on_device(self) -> bool:
        """True if the rule says so, or the function that it binds options to."""
        return bool(getattr(getattr(self.rule, "func", self.rule), "stays_on_device", False))

    @property
    def needs_observation(self) -> bool:
        """True if `observe` must be called after every optimizer step."""
        return self.observes and bool(getattr(self.rule, "needs_observation", True))

    @property
    def needs_validation(self) -> bool:
        """True if `observe_validation` must be called every few steps."""
        return self.observes_validation and bool(getattr(self.rule, "needs_validation", True))

    def forward(self, losses: Losses, context: Context) -> WeightedLosses:
        """Return the weighted losses, unchecked. Shape (K,) -> (K,)."""
        return cast("WeightedLosses", self._call(losses, context))

    def check(self, context: Context) -> None:
        """Raise an error if the rule cannot be applied without the absent tasks, before any state changes."""
        self._present(context)

    def observe(self, losses: Losses, context: Context) -> None:
        """Pass the losses after the optimizer step to a rule that observes them. Shape (K,)."""
        if self.observes:
            self._pass_on(cast("Any", self.rule).observe, losses, context)

    def observe_validation(self, losses: Losses, context: Context) -> None:
        """Pass the losses of a batch of validation data to a rule that observes them. Shape (K,)."""
        if self.observes_validation:
            self._pass_on(cast("Any", self.rule).observe_validation, losses, context)

    def _pass_on(self, observe: Callable[..., None], losses: Losses, context: Context) -> None:
        present = context.present
        try:
            observe(losses, **({"present": present} if present is not None and "present" in _keywords(observe) else {}))
        except TaskError as error:
            if context.tasks is None:
                raise
            raise ValueError(error.naming(context.tasks[error.task])) from None

    def end_epoch(self, mean_losses: Tensor) -> None:
        """Pass the mean losses of an epoch to a rule that uses them. Shape (all tasks,)."""
        if hasattr(self.rule, "end_epoch"):
            self.rule.end_epoch(mean_losses)


class AdaptedGradientBalancer(_Adapted):
    """A gradient balancer in its author's form, as a `GradientBalancer`."""

    sees: Literal["gramian"] = "gramian"

    def __init__(self, rule: Callable[..., Tensor], heads: Heads | None, *, fixed_length: bool | None) -> None:
        super().__init__(rule)
        self.given_heads, self.given_fixed_length = heads, fixed_length
        self.uses_losses = "losses" in self._keywords
        self.uses_cross = "cross" in self._keywords
        self._has_reuse = hasattr(rule, "reuse")

    @property
    def heads(self) -> Heads:
        """Treatment of heads: as given, or as the rule says, which can change from step to step."""
        return self.given_heads or getattr(self.rule, "heads", None) or "unweighted"

    @property
    def fixed_length(self) -> bool:
        """True if the length of the direction does not depend on the lengths of the gradients."""
        given = self.given_fixed_length
        return bool(getattr(self.rule, "fixed_length", False) if given is None else given)

    @property
    def reuses(self) -> bool:
        """True if some steps use the weights of earlier steps."""
        return bool(getattr(self.rule, "reuses", self._has_reuse))

    def forward(self, gramian: Gramian, context: Context) -> Weights:
        """Return the weights, checked and detached. Shape (K, K) -> (K,)."""
        keywords = self._losses(context)
        if context.cross is not None and self.uses_cross:
            keywords["cross"] = context.cross
        return _checked_weights(self._call(gramian, context, **keywords), len(gramian))

    def reuse(self, context: Context) -> Weights | None:
        """Return the weights of an earlier step, checked, or None if the rule must solve. Shape (K,)."""
        if not self._has_reuse:
            return None
        weights = cast("Any", self.rule).reuse(context.present)
        return None if weights is None else _checked_weights(weights, len(context.indices))


class AdaptedJacobianBalancer(_Adapted):
    """A rule that sees the Jacobian, in its author's form, as a `JacobianBalancer`."""

    sees: Literal["jacobian"] = "jacobian"

    def __init__(self, rule: Callable[..., Tensor], heads: Heads, *, fixed_length: bool) -> None:
        super().__init__(rule)
        self.heads, self.fixed_length = heads, fixed_length
        self.uses_losses = "losses" in self._keywords

    def forward(self, jacobian: Jacobian, context: Context) -> Direction:
        """Return the direction, checked and detached. Shape (K, P) -> (P,)."""
        direction = self._call(jacobian, context, **self._losses(context))
        length = jacobian.shape[1:]
        if not isinstance(direction, torch.Tensor) or direction.shape != length or not direction.isfinite().all():
            raise ValueError(f"The gradient balancer must return a finite direction ({length[0]},), but got {direction}.")
        return direction.detach()


def takes(rule: Callable[..., object], keyword: str) -> bool:
    """Return whether a rule in its author's form has a keyword."""
    return keyword in _keywords(rule.forward if isinstance(rule, nn.Module) else rule)


def _keywords(call: Callable[..., object]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(call).parameters)
    except (TypeError, ValueError):  # a built-in function without a signature
        return frozenset()


def _checked_weights(weights: object, num_tasks: int) -> Weights:
    if not isinstance(weights, torch.Tensor) or weights.shape != (num_tasks,) or not all(map(math.isfinite, weights.tolist())):
        raise ValueError(f"The gradient balancer must return {num_tasks} finite weights, but got {weights}.")
    return weights.detach()
