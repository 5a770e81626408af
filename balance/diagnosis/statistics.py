"""Statistics of the losses and task gradients of some batches, and costs of methods relative to a plain step."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..profiling import Cost

STABLE = 1.64  # standard deviations between the mean cosine and 0: if normal, 95 of 100 batches then agree on the sign
NEGLIGIBLE = 0.05  # cosine: of gradients of equal length, each then loses at most 5 % of its progress to the other


class Price(NamedTuple):
    """The cost of a step with a method, relative to a plain step with equal weights.

    Attributes:
        cost: Time and memory of a step; None if the method does not run on this problem.
        time: Multiple of the time of a plain step.
        memory: Multiple of the memory of a plain step.
        reason: The reason why the method does not run or does not train the shared parameters; empty otherwise.
    """

    cost: Cost | None
    time: float
    memory: float
    reason: str = ""

    @property
    def usable(self) -> bool:
        """True if the method runs and trains the shared parameters."""
        return self.cost is not None and not self.reason

    def as_dict(self) -> dict[str, Any]:
        """Return the price for JSON."""
        cost = None if self.cost is None else self.cost._asdict()
        return {"cost": cost, "time": finite(self.time), "memory": finite(self.memory), "reason": self.reason}


class Pair(NamedTuple):
    """Mean and standard deviation, over the batches, of the cosine between the gradients of two tasks."""

    tasks: tuple[str, str]
    mean: float
    spread: float

    @property
    def reading(self) -> str:
        """``"conflict"`` or ``"agreement"`` if the sign is stable, ``"orthogonal"`` if cosines are small, else ``"noise"``."""
        if max(abs(self.mean), self.spread) <= NEGLIGIBLE:
            return "orthogonal"
        if abs(self.mean) < STABLE * self.spread:
            return "noise"
        return "conflict" if self.mean < 0 else "agreement"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Losses and task gradients of B batches at one moment of training, as float64 on the host.

    Attributes:
        tasks: K names.
        losses: Shape (B, K).
        gramians: Inner products of the gradients of the losses with respect to the shared parameters. Shape (B, K, K).
        cosines: Shape (B, K, K).
    """

    tasks: tuple[str, ...]
    losses: Tensor
    gramians: Tensor
    cosines: Tensor

    @property
    def norms(self) -> Tensor:
        """Lengths of the task gradients. Shape (B, K)."""
        return self.gramians.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()

    @property
    def relative_norms(self) -> Tensor:
        """Lengths of the task gradients divided by the sizes of the losses. Shape (B, K)."""
        return self.norms / self.losses.abs()

    @property
    def shares(self) -> Tensor:
        """Shares of the tasks in the squared length of the summed gradient, which sum to 1. Shape (K,).

        The share of a task is negative if the summed gradient raises its loss.
        """
        G = self.gramians.sum(dim=0)
        return G.sum(dim=1) / G.sum()

    @property
    def remaining_length(self) -> float:
        """Length of the summed gradient, relative to its length if the task gradients were orthogonal; 1 if all are zero."""
        G = self.gramians.sum(dim=0)
        orthogonal = float(G.trace())
        return math.sqrt(max(float(G.sum()), 0) / orthogonal) if orthogonal > 0 else 1.0

    @property
    def pairs(self) -> list[Pair]:
        """All pairs of tasks, in order."""
        indices = itertools.combinations(range(len(self.tasks)), 2)
        cosines = [((self.tasks[i], self.tasks[j]), self.cosines[:, i, j]) for i, j in indices]
        return [Pair(tasks, float(column.mean()), float(column.std())) for tasks, column in cosines]

    @property
    def conflict_share(self) -> float:
        """Share of all pairs, at all batches, whose gradients have a negative inner product."""
        i, j = torch.triu_indices(len(self.tasks), len(self.tasks), 1)
        return float((self.cosines[:, i, j] < 0).double().mean())

    def as_dict(self) -> dict[str, Any]:
        """Return the statistics by task or for all tasks; None for a number that is not finite."""
        by_task = {
            "loss_median": median(self.losses),
            "loss_min": self.losses.amin(dim=0),
            "loss_max": self.losses.amax(dim=0),
            "gradient_norm": median(self.norms),
            "relative_gradient_norm": median(self.relative_norms),
            "share_of_sum": self.shares,
        }
        return {
            **{name: dict(zip(self.tasks, map(finite, row.tolist()), strict=True)) for name, row in by_task.items()},
            "loss_ratio": ratio(self.losses),
            "gradient_norm_ratio": ratio(self.norms),
            "relative_gradient_norm_ratio": ratio(self.relative_norms),
            "conflict_share": self.conflict_share,
            "cosines": [{**pair._asdict(), "tasks": list(pair.tasks), "reading": pair.reading} for pair in self.pairs],
        }


def median(values: Tensor) -> Tensor:
    """Return the medians over the batches. Shape (B, K) -> (K,)."""
    return values.quantile(0.5, dim=0, interpolation="midpoint")


def ratio(values: Tensor) -> float:
    """Return the largest divided by the smallest absolute median over the batches, of those that are positive and finite.

    Args:
        values: Shape (B, K).
    """
    sizes = median(values).abs()
    sizes = sizes[(sizes > 0) & sizes.isfinite()]
    return float(sizes.max() / sizes.min()) if len(sizes) else 1.0


def finite(number: float) -> float | None:
    """Return a number for JSON, which has neither infinity nor NaN: None for them."""
    return number if math.isfinite(number) else None
