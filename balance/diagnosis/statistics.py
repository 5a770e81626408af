"""What some batches show of the tasks at one moment of training, and what methods cost: the numbers of a diagnosis."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from balance.profiling import Cost

STABLE = 1.64  # deviations between the mean cosine and 0: if normal, 95 of 100 batches then agree on the sign
NEGLIGIBLE = 0.05  # cosine: of gradients of one length, each then loses at most 5 % of its progress to the other


class Price(NamedTuple):
    """What a method costs per step, or why it does not run on this problem.

    Attributes:
        cost: None where it does not run.
        time: As a multiple of a plain step with equal weights.
        memory: Likewise.
        reason: Why it does not run; empty where it does.
    """

    cost: Cost | None
    time: float
    memory: float
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        cost = None if self.cost is None else self.cost._asdict()
        return {"cost": cost, "time": finite(self.time), "memory": finite(self.memory), "reason": self.reason}


class Pair(NamedTuple):
    """How the gradients of two tasks lie to each other: mean and standard deviation of their cosine over the batches."""

    tasks: tuple[str, str]
    mean: float
    spread: float

    @property
    def reading(self) -> str:
        """``"conflict"`` or ``"agreement"`` where the sign is stable, else ``"noise"``; ``"orthogonal"`` without either."""
        if max(abs(self.mean), self.spread) <= NEGLIGIBLE:
            return "orthogonal"
        if abs(self.mean) < STABLE * self.spread:
            return "noise"
        return "conflict" if self.mean < 0 else "agreement"


@dataclass(frozen=True, eq=False)
class Look:
    """What B batches show at one moment of training; float64, on the host.

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
        """Shares of the tasks in the squared length of the summed gradient. They sum to 1; of a loss that it raises: below 0.

        Shape (K,).
        """
        G = self.gramians.sum(dim=0)
        return G.sum(dim=1) / G.sum()

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
        """The numbers by task or for the whole; None for one that is not finite."""
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
    """Medians over the batches. Shape (B, K) -> (K,)."""
    return values.quantile(0.5, dim=0, interpolation="midpoint")


def ratio(values: Tensor) -> float:
    """Largest to smallest size among the medians over the batches, those that are zero or not finite left out. Shape (B, K)."""
    sizes = median(values).abs()
    sizes = sizes[(sizes > 0) & sizes.isfinite()]
    return float(sizes.max() / sizes.min()) if len(sizes) else 1.0


def finite(number: float) -> float | None:
    """A number for JSON, which has neither infinity nor NaN."""
    return number if math.isfinite(number) else None
