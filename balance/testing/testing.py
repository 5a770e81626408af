"""Properties of rules, for authors of new ones: the checks that this library's own rules pass. Needs hypothesis.

    from balance.testing.testing import check_gradient_balancer
    check_gradient_balancer(lambda num_tasks: my_rule, claims=("conflict_free",))

A factory builds a fresh rule for K tasks; a rule that draws must start from the same seed each time. A claim that does not hold
raises an AssertionError with the simplest counter-example that was found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from balance.messages import unknown
from balance.rules.protocol import takes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    Factory = Callable[[int], Callable[..., Tensor]]

# Claims about scaling, order and rotation, which a rule lists in its registration
INVARIANCES = frozenset(
    {
        "permutation_equivariant",
        "rotation_equivariant",
        "unchanged_by_scaling_one_task",
        "scales_with_the_gradients",
        "linear_under_scaling",
        "loss_permutation_equivariant",
        "gradient_unchanged_by_scaling_a_loss",
        "separable",
    }
)
KINDS = ("generic", "integer", "duplicate", "opposite", "near_parallel", "zero_row", "low_rank", "rounded", "stationary")


def check_gradient_balancer(
    factory: Factory,
    claims: Iterable[str] = (),
    *,
    sees: str = "gramian",
    kinds: Sequence[str] = KINDS,
    max_tasks: int = 8,
    examples: int = 60,
) -> None:
    """Check a gradient balancer on random Jacobians, degenerate ones included.

    Args:
        factory: Number of tasks -> fresh rule.
        claims: Names in `GRADIENT_CLAIMS`, beside ``"finite"``, which is always checked.
        sees: What the rule is given: a ``"gramian"`` or a ``"jacobian"``.
        kinds: Which Jacobians, from `KINDS`.
        max_tasks: Greatest number of tasks.
        examples: Number of Jacobians for each claim.

    Raises:
        AssertionError: If a claim does not hold; the message shows the Jacobian.
        ValueError: If a claim is unknown.
    """
    from hypothesis import strategies as st  # noqa: PLC0415 - only here is hypothesis needed

    @st.composite
    def jacobians(draw: Any) -> Tensor:
        return make_jacobian(draw(st.integers(1, max_tasks)), draw(st.sampled_from(kinds)), draw(st.integers(0, 2**31 - 1)))

    def direct(J: Tensor) -> Tensor:
        return _direction(factory, J, sees)

    for name in dict.fromkeys(("finite", *claims)):
        if name not in GRADIENT_CLAIMS:
            raise ValueError(unknown("claim on gradient balancers", name, GRADIENT_CLAIMS))
        if sees == "jacobian" and name in _ON_WEIGHTS:
            raise ValueError(f"'{name}' is a claim on weights, but a rule that sees the Jacobian has none.")
        subject: Any = factory if name in _ON_WEIGHTS else direct
        _search(name, GRADIENT_CLAIMS[name], subject, jacobians(), "jacobian", examples)


def check_loss_balancer(
    factory: Factory, claims: Iterable[str] = (), *, max_tasks: int = 8, steps: int = 6, examples: int = 60
) -> None:
    """Check a loss balancer on random sequences of positive losses.

    Args:
        factory: Number of tasks -> fresh rule.
        claims: Names in `LOSS_CLAIMS`, beside ``"resumes_bit_for_bit"`` and ``"usable"``, which are always checked.
        max_tasks: Greatest number of tasks.
        steps: Length of the sequences.
        examples: Number of sequences for each claim.

    Raises:
        AssertionError: If a claim does not hold; the message shows the losses, one row for each step.
        ValueError: If a claim is unknown.
    """
    from hypothesis import strategies as st  # noqa: PLC0415 - only here is hypothesis needed

    @st.composite
    def sequences(draw: Any) -> Tensor:
        return make_losses(steps, draw(st.integers(1, max_tasks)), draw(st.integers(0, 2**31 - 1)))

    for name in dict.fromkeys(("usable", "resumes_bit_for_bit", *claims)):
        if name not in LOSS_CLAIMS:
            raise ValueError(unknown("claim on loss balancers", name, LOSS_CLAIMS))
        _search(name, LOSS_CLAIMS[name], factory, sequences(), "losses", examples)


def _search(name: str, claim: Callable[..., None], subject: Any, inputs: Any, kind: str, examples: int) -> None:
    from hypothesis import given, settings  # noqa: PLC0415

    last: list[Tensor] = []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, print_blob=False)
    @given(inputs)
    def check(example: Tensor) -> None:
        try:
            claim(subject, example)
        except AssertionError:
            last.append(example)  # hypothesis ends with the simplest
            raise

    try:
        check()
    except AssertionError as error:
        raise AssertionError(f"The claim '{name}' fails for {kind} = {last[-1].tolist()}: {error}") from None


def make_jacobian(num_tasks: int, kind: str, seed: int) -> Tensor:
    """Return a random Jacobian in float64. Shape (K, K + 3), or (K, K - 1) for ``"low_rank"``.

    Args:
        num_tasks: K.
        kind: One of `KINDS`: rows of different scales, small integers, two rows equal, opposite or nearly parallel, the first
            row zero, dependent rows, rows that are dependent up to rounding to float32, or rows with 0 in their convex hull.
        seed: Decides the numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    J = normal(num_tasks, num_tasks + 3) * (0.7 * normal(num_tasks, 1)).exp()
    if kind == "integer":
        J = torch.randint(-3, 4, J.shape, generator=generator).double()
    elif kind == "low_rank":
        J = J[:, : max(1, num_tasks - 1)]
    elif kind == "rounded":
        rank = max(1, num_tasks - 1)
        J = (J[:, :rank].float() @ normal(rank, num_tasks + 3).float()).double()
    elif kind == "stationary" and num_tasks > 1:
        J[-1] = -normal(num_tasks - 1).exp() @ J[:-1]
    elif kind == "zero_row":
        J[0] = 0
    elif num_tasks > 1 and kind != "generic":
        J[1] = {"duplicate": J[0], "opposite": -2 * J[0], "near_parallel": J[0] + 1e-6 * normal(J.shape[1])}[kind]
    return J


def make_losses(steps: int, num_tasks: int, seed: int) -> Tensor:
    """Random positive losses in float64. Shape (steps, K)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, num_tasks, generator=generator, dtype=torch.float64).exp()


# --- claims on gradient balancers: of the weights (factory, J), or of the direction (direct, J) ------------------------


def _direction(factory: Factory, J: Tensor, sees: str) -> Tensor:
    rule = factory(len(J))
    return rule(J) if sees == "jacobian" else rule(J @ J.T) @ J


def _scales(J: Tensor) -> Tensor:
    return torch.linspace(0.5, 3, len(J), dtype=J.dtype)[:, None]


def _assert_close(a: Tensor, b: Tensor, size: Tensor | float) -> None:
    worst = float((a - b).abs().max())
    assert worst <= 1e-7 * float(size), f"{a.tolist()} differs from {b.tolist()}"


def finite(direct: Callable[[Tensor], Tensor], J: Tensor) -> None:
    """No NaN or infinity comes out of finite gradients."""
    assert direct(J).isfinite().all()


def positive_at_one_task(factory: Factory, J: Tensor) -> None:
    """One task alone gets a positive weight, unless its gradient is zero."""
    weights = factory(1)(J[-1:] @ J[-1:].T)
    assert weights.shape == (1,)
    assert weights > 0 or not J[-1].any()


def permutation_equivariant(direct: Callable[[Tensor], Tensor], J: Tensor) -> None:
    """The direction does not depend on the order of the tasks."""
    _assert_close(direct(J.roll(1, dims=0)), direct(J), _size(direct, J))


def rotation_equivariant(direct: Callable[[Tensor], Tensor], J: Tensor) -> None:
    """Turning all gradients turns the direction with them."""
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(J.shape[1], J.shape[1], generator=generator, dtype=J.dtype)
    Q = torch.linalg.qr(square).Q
    _assert_close(direct(J @ Q), direct(J) @ Q, _size(direct, J))


def on_simplex(factory: Factory, J: Tensor) -> None:
    """Weights are non-negative and sum to one."""
    weights = factory(len(J))(J @ J.T)
    assert (weights >= 0).all()
    assert abs(float(weights.sum()) - 1) <= 1e-9


def at_least_one(factory: Factory, J: Tensor) -> None:
    """No weight is below one."""
    assert (factory(len(J))(J @ J.T) >= 1 - 1e-12).all()


def non_negative(factory: Factory, J: Tensor) -> None:
    """No weight is negative."""
    assert (factory(len(J))(J @ J.T) >= 0).all()


def conflict_free(direct: Callable[[Tensor], Tensor], J: Tensor) -> None:
    """The direction has no negative inner product with any task gradient."""
    d = direct(J)
    assert (J @ d >= -1e-7 * J.norm(dim=1) * _size(direct, J)).all(), f"inner products {(J @ d).tolist()}"


def unchanged_by_scaling_one_task(direct: Callable[[Tensor], Tensor], J: Tensor) -> None:
    """Multiplying task gradients by positive constants does not turn the direction."""
    a, b = direct(J), direct(_scales(J) * J)
    assert a @ b >= (1 - 1e-7) * a.norm() * b.norm() - 1e-12 * J.norm() ** 2, f"cosine {float(a @ b / a.norm() / b.norm())}"


def scales_with_the_gradients(direct: Callable[[Tensor], Tensor], J: Tensor) -> None:
    """Multiplying all gradients by a constant multiplies the direction by it."""
    _assert_close(direct(1e-3 * J), 1e-3 * direct(J), 1e-3 * _size(direct, J))


def linear_under_scaling(direct: Callable[[Tensor], Tensor], J: Tensor) -> None:
    """The direction of (c + c') J is the sum of those of c J and c' J, for positive constants by task."""
    c = _scales(J)
    _assert_close(direct((1 + c) * J), direct(J) + direct(c * J), len(J) * _size(direct, J))


def sum_without_conflict(direct: Callable[[Tensor], Tensor], J: Tensor) -> None:
    """Where no gradients conflict the direction is their sum."""
    J = J.abs()
    _assert_close(direct(J), J.sum(dim=0), _size(direct, J))


def equal_projections(direct: Callable[[Tensor], Tensor], J: Tensor) -> None:
    """The direction has the same projection onto every task gradient that is not zero."""
    J = J[J.norm(dim=1) > 0]
    if len(J):
        d = direct(J)
        projections = J @ d / J.norm(dim=1)
        _assert_close(projections, projections.mean().expand_as(projections), _size(direct, J))


def _size(direct: Callable[[Tensor], Tensor], J: Tensor) -> float:
    """Length to compare differences with: of the gradients, or of the direction if that is greater."""
    return max(float(J.norm() * len(J)), float(direct(J).norm()), 1e-300)


GRADIENT_CLAIMS: dict[str, Callable[..., None]] = {
    claim.__name__: claim
    for claim in (
        finite,
        positive_at_one_task,
        permutation_equivariant,
        rotation_equivariant,
        on_simplex,
        at_least_one,
        non_negative,
        conflict_free,
        unchanged_by_scaling_one_task,
        scales_with_the_gradients,
        linear_under_scaling,
        sum_without_conflict,
        equal_projections,
    )
}
_ON_WEIGHTS = ("positive_at_one_task", "on_simplex", "at_least_one", "non_negative")


# --- claims on loss balancers: (factory, L), where L is a sequence of losses, shape (steps, K) -----------------------


def derivatives(rule: Callable[..., Tensor], sequence: Tensor, *, without_last: bool = False) -> Tensor:
    """Derivatives of the sum of the weighted losses at each step; the rule observes the next row and ends an epoch after each.

    Args:
        rule: A fresh loss balancer.
        sequence: Shape (steps, K).
        without_last: The rule was built for one task more, which is never present.

    Returns:
        Shape (steps, K).
    """
    keyword = {"present": torch.arange(sequence.shape[1])} if without_last and takes(rule, "present") else {}
    absent = sequence.new_full((int(without_last),), torch.nan)
    found = []
    for row, after in zip(sequence, [*sequence[1:], 0.9 * sequence[-1]], strict=True):
        losses = row.clone().requires_grad_()
        found.append(torch.autograd.grad(rule(losses, **keyword).sum(), losses)[0])
        if hasattr(rule, "observe") and getattr(rule, "needs_observation", True):
            rule.observe(after, **keyword)
        if hasattr(rule, "end_epoch"):
            rule.end_epoch(torch.cat([row, absent]))
    return torch.stack(found)


def _assert_same(a: Tensor, b: Tensor) -> None:
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), f"weights {a.tolist()} differ from {b.tolist()}"


def usable(factory: Factory, L: Tensor) -> None:
    """One finite value comes out for each task, differentiable, in the dtype of the losses."""
    for dtype in (torch.float32, torch.float64):
        losses = L[0].to(dtype).requires_grad_()
        weighted = factory(len(losses))(losses)
        assert weighted.shape == losses.shape, f"shape {tuple(weighted.shape)} for losses {tuple(losses.shape)}"
        assert weighted.dtype == dtype, f"dtype {weighted.dtype} for losses {dtype}"
        assert weighted.isfinite().all()
        assert weighted.requires_grad, "the weighted losses are detached from the losses"


def loss_permutation_equivariant(factory: Factory, L: Tensor) -> None:
    """The weights do not depend on the order of the tasks."""
    K = L.shape[1]
    _assert_same(derivatives(factory(K), L.roll(1, dims=1)), derivatives(factory(K), L).roll(1, dims=1))


def positive_weights(factory: Factory, L: Tensor) -> None:
    """All weights are positive."""
    assert (derivatives(factory(L.shape[1]), L) > 0).all()


def weights_sum_to_one(factory: Factory, L: Tensor) -> None:
    """Weights, that is, derivatives with respect to the losses, sum to one."""
    _assert_same(derivatives(factory(L.shape[1]), L).sum(dim=1), torch.ones(len(L), dtype=L.dtype))


def weights_sum_to_k(factory: Factory, L: Tensor) -> None:
    """Weights sum to the number of tasks."""
    _assert_same(derivatives(factory(L.shape[1]), L).sum(dim=1), torch.full((len(L),), float(L.shape[1]), dtype=L.dtype))


def factors_sum_to_k(factory: Factory, L: Tensor) -> None:
    """Weights of the logarithms of the losses sum to the number of tasks."""
    factors = (derivatives(factory(L.shape[1]), L) * L).sum(dim=1)
    _assert_same(factors, torch.full((len(L),), float(L.shape[1]), dtype=L.dtype))


def gradient_unchanged_by_scaling_a_loss(factory: Factory, L: Tensor) -> None:
    """The weights make up for constant factors on the losses, up to one common factor."""
    scales = torch.linspace(0.5, 3, L.shape[1], dtype=L.dtype)
    a, b = derivatives(factory(L.shape[1]), L), derivatives(factory(L.shape[1]), scales * L) * scales
    assert torch.allclose(a / a.sum(dim=1, keepdim=True), b / b.sum(dim=1, keepdim=True), rtol=1e-5)


def separable(factory: Factory, L: Tensor) -> None:
    """A weighted loss has derivative zero with respect to the losses of other tasks."""
    losses = L[0].clone().requires_grad_()
    weighted = factory(len(losses))(losses)
    rows = torch.stack([torch.autograd.grad(w, losses, retain_graph=True)[0] for w in weighted])
    assert torch.equal(rows, rows.diagonal().diag())


def absent_task_is_a_smaller_problem(factory: Factory, L: Tensor) -> None:
    """With the last task never present, the others are treated as if it did not exist."""
    K = L.shape[1]
    if K > 1:
        _assert_same(derivatives(factory(K), L[:, :-1], without_last=True), derivatives(factory(K - 1), L[:, :-1]))


def resumes_bit_for_bit(factory: Factory, L: Tensor) -> None:
    """A rule that is a module goes on from its state_dict as if it had not been stopped."""
    rule, resumed = factory(L.shape[1]), factory(L.shape[1])
    if isinstance(rule, nn.Module) and isinstance(resumed, nn.Module):
        half = len(L) // 2
        derivatives(rule, L[:half])
        resumed.load_state_dict(rule.state_dict())
        assert torch.equal(derivatives(rule, L[half:]), derivatives(resumed, L[half:]))


LOSS_CLAIMS: dict[str, Callable[..., None]] = {
    claim.__name__: claim
    for claim in (
        usable,
        loss_permutation_equivariant,
        positive_weights,
        weights_sum_to_one,
        weights_sum_to_k,
        factors_sum_to_k,
        gradient_unchanged_by_scaling_a_loss,
        separable,
        absent_task_is_a_smaller_problem,
        resumes_bit_for_bit,
    )
}
