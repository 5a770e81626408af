"""Claims about gradient balancers: functions that raise an AssertionError for a Jacobian on which the claim fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch

from ..messages import unknown
from ..types import Direction, GradientRule, Jacobian, Sees, Weights
from .inputs import KINDS, check_on_examples, make_jacobian

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

Factory: TypeAlias = Callable[[int], GradientRule]


@dataclass(frozen=True)
class RuleUnderTest:
    """A gradient balancer as a function of Jacobians; every call builds a fresh rule.

    Attributes:
        factory: Function of K that returns a fresh rule.
        sees: Input of the rule: a ``"gramian"``, mapped to weights, or a ``"jacobian"``, mapped to a direction.
    """

    factory: Factory
    sees: Sees = "gramian"

    def weights(self, J: Jacobian) -> Weights:
        """Return the weights of a rule that sees a Gramian. Shape (K, P) -> (K,)."""
        return self.factory(len(J))(J @ J.T)

    def direction(self, J: Jacobian) -> Direction:
        """Return the direction. Shape (K, P) -> (P,)."""
        return self.factory(len(J))(J) if self.sees == "jacobian" else self.weights(J) @ J


Claim: TypeAlias = Callable[[RuleUnderTest, Jacobian], None]


def check_gradient_balancer(
    factory: Factory,
    claims: Iterable[str] = (),
    *,
    sees: Sees = "gramian",
    kinds: Sequence[str] = KINDS,
    max_tasks: int = 8,
    examples: int = 60,
) -> None:
    """Check a gradient balancer on random Jacobians, degenerate Jacobians included.

    Args:
        factory: Function of the number of tasks that returns a fresh rule.
        claims: Names in `GRADIENT_CLAIMS`, next to ``"finite"``, which is always checked.
        sees: Input of the rule: a ``"gramian"`` or a ``"jacobian"``.
        kinds: Kinds of Jacobians, from `KINDS`.
        max_tasks: Greatest number of tasks.
        examples: Number of Jacobians for each claim.

    Raises:
        AssertionError: If a claim fails; the message shows the Jacobian.
        ValueError: If a claim is unknown, or is about weights and the rule has none.
    """
    from hypothesis import strategies as st  # noqa: PLC0415 - an option, not a dependency

    rule = RuleUnderTest(factory, sees)
    jacobians = st.builds(make_jacobian, st.integers(1, max_tasks), st.sampled_from(kinds), st.integers(0, 2**31 - 1))
    for name in dict.fromkeys(("finite", *claims)):
        if name not in GRADIENT_CLAIMS:
            raise ValueError(unknown("claim on gradient balancers", name, GRADIENT_CLAIMS))
        if sees == "jacobian" and name in WEIGHT_CLAIMS:
            raise ValueError(f"'{name}' is a claim on weights, but a rule that sees the Jacobian has none.")
        check_on_examples(name, partial(GRADIENT_CLAIMS[name], rule), jacobians, "jacobian", examples)


def finite(rule: RuleUnderTest, J: Jacobian) -> None:
    """Check that the direction of finite gradients is finite."""
    assert rule.direction(J).isfinite().all()


def positive_at_one_task(rule: RuleUnderTest, J: Jacobian) -> None:
    """Check that a single task gets one positive weight, unless its gradient is zero."""
    weights = rule.weights(J[-1:])
    assert weights.shape == (1,)
    assert weights > 0 or not J[-1].any()


def permutation_equivariant(rule: RuleUnderTest, J: Jacobian) -> None:
    """Check that the direction does not depend on the order of the tasks."""
    _assert_close(rule.direction(J.roll(1, dims=0)), rule.direction(J), _size(rule, J))


def rotation_equivariant(rule: RuleUnderTest, J: Jacobian) -> None:
    """Check that a rotation of all gradients rotates the direction."""
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(J.shape[1], J.shape[1], generator=generator, dtype=J.dtype)
    Q = torch.linalg.qr(square).Q
    _assert_close(rule.direction(J @ Q), rule.direction(J) @ Q, _size(rule, J))


def on_simplex(rule: RuleUnderTest, J: Jacobian) -> None:
    """Check that the weights are non-negative and sum to one."""
    weights = rule.weights(J)
    assert (weights >= 0).all()
    assert abs(float(weights.sum()) - 1) <= 1e-9


def at_least_one(rule: RuleUnderTest, J: Jacobian) -> None:
    """Check that no weight is below one."""
    assert (rule.weights(J) >= 1 - 1e-12).all()


def non_negative(rule: RuleUnderTest, J: Jacobian) -> None:
    """Check that no weight is negative."""
    assert (rule.weights(J) >= 0).all()


def conflict_free(rule: RuleUnderTest, J: Jacobian) -> None:
    """Check that the direction has no negative inner product with any task gradient."""
    d = rule.direction(J)
    assert (J @ d >= -1e-7 * J.norm(dim=1) * _size(rule, J)).all(), f"inner products {(J @ d).tolist()}"


def unchanged_by_scaling_one_task(rule: RuleUnderTest, J: Jacobian) -> None:
    """Check that positive constants, multiplied to the task gradients, do not turn the direction."""
    a, b = rule.direction(J), rule.direction(_scales(J) * J)
    assert a @ b >= (1 - 1e-7) * a.norm() * b.norm() - 1e-12 * J.norm() ** 2, f"cosine {float(a @ b / a.norm() / b.norm())}"


def scales_with_the_gradients(rule: RuleUnderTest, J: Jacobian) -> None:
    """Check that one constant, multiplied to all gradients, multiplies the direction."""
    _assert_close(rule.direction(1e-3 * J), 1e-3 * rule.direction(J), 1e-3 * _size(rule, J))


def linear_under_scaling(rule: RuleUnderTest, J: Jacobian) -> None:
    """Check that the directions of c J and c' J add up to the direction of (c + c') J, for positive constants by task."""
    c = _scales(J)
    _assert_close(rule.direction((1 + c) * J), rule.direction(J) + rule.direction(c * J), len(J) * _size(rule, J))


def sum_without_conflict(rule: RuleUnderTest, J: Jacobian) -> None:
    """Check that the direction of gradients without conflict is their sum."""
    J = J.abs()
    _assert_close(rule.direction(J), J.sum(dim=0), _size(rule, J))


def equal_projections(rule: RuleUnderTest, J: Jacobian) -> None:
    """Check that the direction has the same projection onto every task gradient that is not zero."""
    J = J[J.norm(dim=1) > 0]
    if len(J):
        projections = J @ rule.direction(J) / J.norm(dim=1)
        _assert_close(projections, projections.mean().expand_as(projections), _size(rule, J))


def _scales(J: Jacobian) -> Tensor:
    """Return a different positive constant for every task. Shape (K, 1)."""
    return torch.linspace(0.5, 3, len(J), dtype=J.dtype)[:, None]


def _assert_close(a: Tensor, b: Tensor, size: float) -> None:
    worst = float((a - b).abs().max())
    assert worst <= 1e-7 * size, f"{a.tolist()} differs from {b.tolist()}"


def _size(rule: RuleUnderTest, J: Jacobian) -> float:
    """Return the length that errors are relative to: the length of the gradients, or of the direction if it is greater."""
    return max(float(J.norm() * len(J)), float(rule.direction(J).norm()), 1e-300)


WEIGHT_CLAIMS = ("positive_at_one_task", "on_simplex", "at_least_one", "non_negative")  # not for rules that see the Jacobian

GRADIENT_CLAIMS: dict[str, Claim] = {
    "finite": finite,
    "positive_at_one_task": positive_at_one_task,
    "permutation_equivariant": permutation_equivariant,
    "rotation_equivariant": rotation_equivariant,
    "on_simplex": on_simplex,
    "at_least_one": at_least_one,
    "non_negative": non_negative,
    "conflict_free": conflict_free,
    "unchanged_by_scaling_one_task": unchanged_by_scaling_one_task,
    "scales_with_the_gradients": scales_with_the_gradients,
    "linear_under_scaling": linear_under_scaling,
    "sum_without_conflict": sum_without_conflict,
    "equal_projections": equal_projections,
}
