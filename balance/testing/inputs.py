"""Random inputs of rules, degenerate inputs included, and the search for one on which a claim fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import SearchStrategy
    from torch import Tensor

    from ..types import Jacobian

KINDS = ("generic", "integer", "duplicate", "opposite", "near_parallel", "zero_row", "low_rank", "rounded", "stationary")


def make_jacobian(num_tasks: int, kind: str, seed: int) -> Jacobian:
    """Return a random Jacobian in float64.

    Args:
        num_tasks: Number of tasks, K.
        kind: Property of the rows, one of `KINDS`. ``"generic"`` rows have different scales. ``"low_rank"`` rows are
            dependent, and ``"rounded"`` rows are dependent up to rounding to float32. ``"stationary"`` rows have 0 in their
            convex hull.
        seed: Seed of the numbers.

    Returns:
        Shape (K, K + 3), or (K, max(1, K - 1)) for ``"low_rank"``.
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
    """Return random positive losses in float64. Shape (steps, K)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, num_tasks, generator=generator, dtype=torch.float64).exp()


def check_on_examples(
    name: str, claim: Callable[[Tensor], None], inputs: SearchStrategy[Tensor], kind: str, examples: int
) -> None:
    """Check a claim on inputs that hypothesis draws, and shrinks where the claim fails.

    Args:
        name: Name of the claim, for the message.
        claim: Function that raises an AssertionError for an input on which the claim fails.
        inputs: Strategy that draws an input.
        kind: Name of an input, for the message.
        examples: Number of inputs.

    Raises:
        AssertionError: If the claim fails; the message shows the simplest input on which it does.
    """
    from hypothesis import given, settings  # noqa: PLC0415 - an option, not a dependency

    failures: list[Tensor] = []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, print_blob=False)
    @given(inputs)
    def check(example: Tensor) -> None:
        try:
            claim(example)
        except AssertionError:
            failures.append(example)  # the last is the simplest
            raise

    try:
        check()
    except AssertionError as error:
        raise AssertionError(f"The claim '{name}' fails for {kind} = {failures[-1].tolist()}: {error}") from None
