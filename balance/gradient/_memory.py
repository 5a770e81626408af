"""Gradients that a rule remembers from step to step, in a buffer whose width is known at the first step only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Gramian, Jacobian

_BLOCK = 2**20  # columns that are converted to float64 at a time


class GradientMemory(nn.Module):
    """Rows of P numbers that a rule keeps, such as averages of the task gradients.

    The buffer has no columns before the first step, so that the state_dict has the same names before and after it. It gets the
    device of the first Jacobian, and its dtype, but at least float32. A checkpoint of any width can be loaded.

    Args:
        num_rows: Number of rows.
        method: Name of the rule, for messages.

    Attributes:
        rows: The buffer. Shape (num_rows, P), or (num_rows, 0) before the first step.
    """

    rows: Tensor

    def __init__(self, num_rows: int, method: str) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("rows", torch.zeros(num_rows, 0))

    def like(self, jacobian: Jacobian) -> Tensor:
        """Return the buffer on the device of a Jacobian; zeros at the first step.

        Args:
            jacobian: Shape (K, P).

        Returns:
            The buffer itself. Shape (num_rows, P).

        Raises:
            ValueError: If ``jacobian`` is not a matrix, or P has changed.
        """
        if jacobian.ndim != 2:
            raise ValueError(f"jacobian must have shape (K, P), but got {tuple(jacobian.shape)}.")
        width = jacobian.shape[1]
        if self.rows.shape[1] == 0:
            dtype = torch.promote_types(torch.promote_types(self.rows.dtype, jacobian.dtype), torch.float32)
            self.rows = torch.zeros(len(self.rows), width, dtype=dtype, device=jacobian.device)
        if self.rows.shape[1] != width:
            raise ValueError(
                f"'{self.method}' remembers gradients of {self.rows.shape[1]} shared parameters, but got {width}. The shared "
                "parameters must be the same at every step. Build a new balancer if they have changed."
            )
        if self.rows.device != jacobian.device:
            self.rows = self.rows.to(jacobian.device)
        return self.rows

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}rows")
        if isinstance(saved, torch.Tensor) and saved.ndim == 2 and len(saved) == len(self.rows):
            self.rows = torch.empty(saved.shape, dtype=saved.dtype, device=self.rows.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def inner_products(rows: Tensor) -> Gramian:
    """Return the Gramian of some rows, summed in float64, on the host. Shape (K, P) -> (K, K)."""
    gramian = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for block in torch.split(rows, _BLOCK, dim=1):
        wide = block.double()
        gramian += wide @ wide.T
    return gramian.cpu()
