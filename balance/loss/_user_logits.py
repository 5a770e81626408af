"""Numbers by task that an optimizer of the user's choice learns, from gradients that a rule computes itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .uncertainty import scalars

if TYPE_CHECKING:
    from torch import Tensor


class UserLogits(nn.Module):
    """One scalar parameter per task, and the gradient that its optimizer has not used yet.

    `set_gradient` writes ``.grad``, for an optimizer that steps at once. An optimizer that also trains the model clears
    ``.grad`` before its next step. So `pending` is a term of the next losses, with value zero and the same gradient, until the
    parameter has moved.

    Args:
        num_tasks: Number of tasks, K.

    Attributes:
        logits: The parameters.
        gradient: Gradient of each task that is still to be used; NaN where there is none. Shape (K,).
        set_at: Values of the parameters to which these gradients belong. Shape (K,).
    """

    gradient: Tensor
    set_at: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.logits = scalars(num_tasks)
        for name in ("gradient", "set_at"):
            self.register_buffer(name, torch.full((num_tasks,), torch.nan, dtype=torch.float64, device="cpu"))
        self._written: dict[int, Tensor] = {}  # `.grad` of each task as `set_gradient` has left it

    def values(self) -> Tensor:
        """Return the values of the parameters. Shape (K,), float64, on the host."""
        return torch.stack(list(self.logits.parameters())).detach().to("cpu", torch.float64)

    def set_gradient(self, tasks: Tensor, gradient: Tensor) -> None:
        """Write the gradient of some tasks to ``.grad``. Shapes (k,), (k,)."""
        self.gradient[tasks] = gradient.to(self.gradient)
        self.set_at[tasks] = self.values()[tasks].to(self.set_at)
        parameters = list(self.logits.parameters())
        pieces = gradient.to(parameters[0]).unbind()
        for k, piece in zip(tasks.tolist(), pieces, strict=True):
            parameters[k].grad = self._written[k] = piece.detach().clone()

    def pending(self) -> Tensor:
        """Return a scalar of value zero whose gradient is the unused gradient, and clear used gradients."""
        used = self.values().to(self.set_at) != self.set_at  # NaN is unequal to everything
        self.gradient[used] = torch.nan
        parameters = list(self.logits.parameters())
        for k, gradient in self._written.items():
            if parameters[k].grad is gradient:  # the term below brings an unused gradient back
                parameters[k].grad = None
        unused = (~self.gradient.isnan()).nonzero().flatten()
        if not len(unused):
            return torch.zeros((), device="cpu")
        logits = torch.stack([parameters[k] for k in unused.tolist()])
        return self.gradient[unused].to(logits) @ (logits - logits.detach())
