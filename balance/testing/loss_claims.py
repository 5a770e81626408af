"""Claims about loss balancers: functions that raise an AssertionError for a sequence of losses on which the claim fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from ..messages import unknown
from ..rules.context import Context
from ..rules.protocol import adapt_loss_balancer
from ..types import LossRule
from .inputs import check_on_examples, make_losses

if TYPE_CHECKING:
    from collections.abc import Iterable

Factory: TypeAlias = Callable[[int], LossRule]
Claim: TypeAlias = Callable[[Factory, Tensor], None]  # of losses of shape (steps, K)


def check_loss_balancer(
    factory: Factory, claims: Iterable[str] = (), *, max_tasks: int = 8, steps: int = 6, examples: int = 60
) -> None:
    """Check a loss balancer on random sequences of positive losses.

    Args:
        factory: Function of the number of tasks that returns a fresh rule.
        claims: Names in `LOSS_CLAIMS`, next to ``"resumes_bit_for_bit"`` and ``"usable"``, which are always checked.
        max_tasks: Greatest number of tasks.
        steps: Length of the sequences.
        examples: Number of sequences for each claim.

    Raises:
        AssertionError: If a claim fails; the message shows the losses, one row for each step.
        ValueError: If a claim is unknown.
    """
    from hypothesis import strategies as st  # noqa: PLC0415 - an option, not a dependency

    sequences = st.builds(make_losses, st.just(steps), st.integers(1, max_tasks), st.integers(0, 2**31 - 1))
    for name in dict.fromkeys(("usable", "resumes_bit_for_bit", *claims)):
        if name not in LOSS_CLAIMS:
            raise ValueError(unknown("claim on loss balancers", name, LOSS_CLAIMS))
        check_on_examples(name, partial(LOSS_CLAIMS[name], factory), sequences, "losses", examples)


def derivatives(rule: LossRule, sequence: Tensor, *, without_last: bool = False) -> Tensor:
    """Return the derivatives of the sum of the weighted losses at each step.

    After each step the rule observes the next row, also as validation losses, and ends an epoch.

    Args:
        rule: A fresh loss balancer.
        sequence: Shape (steps, K).
        without_last: The rule was built for one more task, which is never present.

    Returns:
        Shape (steps, K).

    Raises:
        ValueError: If a task is absent from a rule that keeps state by task and has no keyword ``present``.
    """
    balancer = adapt_loss_balancer(rule)
    context = Context(torch.arange(sequence.shape[1]), sequence.shape[1] + without_last)
    absent = sequence.new_full((int(without_last),), torch.nan)
    steps = []
    for row, after in zip(sequence, [*sequence[1:], 0.9 * sequence[-1]], strict=True):
        losses = row.clone().requires_grad_()
        steps.append(torch.autograd.grad(balancer(losses, context).sum(), losses)[0])
        if balancer.needs_observation:
            balancer.observe(after, context)
        if balancer.needs_validation:
            balancer.observe_validation(after, context)
        balancer.end_epoch(torch.cat([row, absent]))
    return torch.stack(steps)


def usable(factory: Factory, L: Tensor) -> None:
    """Check that every weighted loss is a finite, differentiable scalar in the dtype of the losses."""
    for dtype in (torch.float32, torch.float64):
        losses = L[0].to(dtype).requires_grad_()
        weighted = factory(len(losses))(losses)
        assert weighted.shape == losses.shape, f"shape {tuple(weighted.shape)} for losses {tuple(losses.shape)}"
        assert weighted.dtype == dtype, f"dtype {weighted.dtype} for losses {dtype}"
        assert weighted.isfinite().all()
        assert weighted.requires_grad, "the weighted losses are detached from the losses"


def loss_permutation_equivariant(factory: Factory, L: Tensor) -> None:
    """Check that the weights do not depend on the order of the tasks."""
    K = L.shape[1]
    _assert_same(derivatives(factory(K), L.roll(1, dims=1)), derivatives(factory(K), L).roll(1, dims=1))


def positive_weights(factory: Factory, L: Tensor) -> None:
    """Check that all weights are positive."""
    assert (derivatives(factory(L.shape[1]), L) > 0).all()


def weights_sum_to_one(factory: Factory, L: Tensor) -> None:
    """Check that the weights, which are derivatives with respect to the losses, sum to one."""
    _assert_same(derivatives(factory(L.shape[1]), L).sum(dim=1), torch.ones(len(L), dtype=L.dtype))


def weights_sum_to_k(factory: Factory, L: Tensor) -> None:
    """Check that the weights sum to the number of tasks."""
    _assert_same(derivatives(factory(L.shape[1]), L).sum(dim=1), torch.full((len(L),), float(L.shape[1]), dtype=L.dtype))


def factors_sum_to_k(factory: Factory, L: Tensor) -> None:
    """Check that the weights of the logarithms of the losses sum to the number of tasks."""
    factors = (derivatives(factory(L.shape[1]), L) * L).sum(dim=1)
    _assert_same(factors, torch.full((len(L),), float(L.shape[1]), dtype=L.dtype))


def gradient_unchanged_by_scaling_a_loss(factory: Factory, L: Tensor) -> None:
    """Check that the weights cancel constant factors of the losses, up to one common factor."""
    scales = torch.linspace(0.5, 3, L.shape[1], dtype=L.dtype)
    a, b = derivatives(factory(L.shape[1]), L), derivatives(factory(L.shape[1]), scales * L) * scales
    assert torch.allclose(a / a.sum(dim=1, keepdim=True), b / b.sum(dim=1, keepdim=True), rtol=1e-5)


def separable(factory: Factory, L: Tensor) -> None:
    """Check that a weighted loss has derivative zero with respect to the losses of other tasks."""
    losses = L[0].clone().requires_grad_()
    weighted = factory(len(losses))(losses)
    rows = torch.stack([torch.autograd.grad(w, losses, retain_graph=True)[0] for w in weighted])
    assert torch.equal(rows, rows.diagonal().diag())


def absent_task_is_a_smaller_problem(factory: Factory, L: Tensor) -> None:
    """Check that a last task that is never present has no effect on the other tasks."""
    K = L.shape[1]
    if K > 1:
        _assert_same(derivatives(factory(K), L[:, :-1], without_last=True), derivatives(factory(K - 1), L[:, :-1]))


def resumes_bit_for_bit(factory: Factory, L: Tensor) -> None:
    """Check that a rule that is a module continues from its state_dict as if it had not been stopped."""
    rule, resumed = factory(L.shape[1]), factory(L.shape[1])
    if isinstance(rule, nn.Module) and isinstance(resumed, nn.Module):
        half = len(L) // 2
        derivatives(rule, L[:half])
        resumed.load_state_dict(rule.state_dict())
        assert torch.equal(derivatives(rule, L[half:]), derivatives(resumed, L[half:]))


def _assert_same(a: Tensor, b: Tensor) -> None:
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), f"weights {a.tolist()} differ from {b.tolist()}"


LOSS_CLAIMS: dict[str, Claim] = {
    "usable": usable,
    "loss_permutation_equivariant": loss_permutation_equivariant,
    "positive_weights": positive_weights,
    "weights_sum_to_one": weights_sum_to_one,
    "weights_sum_to_k": weights_sum_to_k,
    "factors_sum_to_k": factors_sum_to_k,
    "gradient_unchanged_by_scaling_a_loss": gradient_unchanged_by_scaling_a_loss,
    "separable": separable,
    "absent_task_is_a_smaller_problem": absent_task_is_a_smaller_problem,
    "resumes_bit_for_bit": resumes_bit_for_bit,
}
