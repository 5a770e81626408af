"""A balancer as its steps see it, and a step that is ready to be taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from .writing import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from ..engine.accumulate import LeafGradient
    from ..engine.partition import Partition
    from ..engine.task_gradients import TaskGradients
    from ..rules.protocol import GradientBalancer, JacobianBalancer
    from .arguments import NanPolicy, StepLosses
    from .learning import LastCall
    from .over_ranks import Agreed
    from .own_gradients import OwnGradients


class Owner(Stage, Protocol):
    """A balancer, whose step is executed.

    Attributes:
        tasks: Names of all tasks; empty with one loss per sample.
        nan: Meaning of a loss of NaN.
        gradient_balancer: Rule of the gradients; None: one ordinary backward pass.
        loss_sums: Sums of the losses of the epoch. Shape (tasks,)
        loss_counts: Numbers of the steps of the epoch. Shape (tasks,)
        own_gradients: Gradients that steps have left in the balancer's parameters.
        last: Record of the last call.
    """

    tasks: tuple[str, ...]
    nan: NanPolicy
    gradient_balancer: GradientBalancer | JacobianBalancer | None
    loss_sums: Tensor
    loss_counts: Tensor
    own_gradients: OwnGradients
    last: LastCall

    @property
    def collection(self) -> object | None:
        """The open collection of micro-batches; None if there is none."""

    def parameters(self) -> Iterator[Tensor]:
        """Return the balancer's parameters."""

    def delays(self, losses: Tensor) -> bool:
        """Return whether the checks of a call with these losses are read one call later."""


class Prepared(NamedTuple):
    """A step that is ready to be taken.

    Attributes:
        parameters: Parameters of the balancer.
        step: The losses; over several ranks their means.
        parts: Leaf tensors of the graph; None without a gradient balancer.
        agreed: Agreement of the ranks; None with one process, and if gradients have been collected.
        collected: Gradients of the tasks that have been computed before.
        extras: Gradients of the extra losses that have been computed before, with all factors.
    """

    parameters: list[Tensor]
    step: StepLosses
    parts: Partition | None
    agreed: Agreed | None = None
    collected: TaskGradients | None = None
    extras: Sequence[LeafGradient] = ()
