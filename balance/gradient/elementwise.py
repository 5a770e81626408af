"""Rules that must see every coordinate of the gradients: GradDrop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..rules.generator import SeededGenerator
from ..rules.registry import gradient_balancers

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Direction, Jacobian


@gradient_balancers.register(
    "graddrop",
    sees="jacobian",
    heads="unweighted",
    label="GradDrop",
    paper="Chen et al. 2020, https://arxiv.org/abs/2010.06808",
    remedies=("conflict",),
    invariances=("permutation_equivariant", "scales_with_the_gradients"),
)
class GradDrop(nn.Module):
    r"""Gradient sign dropout: at every coordinate only the gradients of one random sign count.

    .. math:: p = \tfrac12 \Bigl(1 + \frac{\sum_k g_k}{\sum_k |g_k|}\Bigr), \qquad
              d = \sum_k g_k \bigl(\ell + (1 - \ell) [\, g_k > 0,\ p > u \;\text{or}\; g_k < 0,\ p < u \,]\bigr)

    where u is uniform on (0, 1) for each coordinate and shared by the tasks. Where all gradients agree in sign, and for one
    task, the direction is their sum. Coordinates at which all gradients are zero stay zero. The direction is not a function of
    the Gramian.

    Args:
        leak: ℓ in 0..1, the factor of the dropped gradients; 1 gives the sum.
        seed: Seed of the draws; the generator is saved in the state_dict.

    Raises:
        ValueError: If ``leak`` is out of range.

    Source:
        Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout", NeurIPS 2020, algorithm 1,
        on parameters as in the FAMO code base. Differs: no epsilon in the purity; one leak for all tasks.
    """

    def __init__(self, leak: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= leak <= 1:
            raise ValueError(f"leak of 'graddrop' must be in 0..1, but got {leak}.")
        self.leak = leak
        self.random = SeededGenerator(seed)

    def forward(self, jacobian: Jacobian) -> Direction:
        """Return the direction of one step.

        Args:
            jacobian: Rows are task gradients. Shape (K, P).

        Returns:
            Shape (P,), dtype and device of ``jacobian``.

        Raises:
            ValueError: If ``jacobian`` is not a matrix.
        """
        if jacobian.ndim != 2:
            raise ValueError(f"jacobian must have shape (K, P), but got {tuple(jacobian.shape)}.")
        return drop_signs(jacobian, self.random.uniform(jacobian.shape[1]).to(jacobian), self.leak)


def drop_signs(jacobian: Jacobian, u: Tensor, leak: float) -> Direction:
    """Return GradDrop's direction for given draws u. Shapes (K, P), (P,) -> (P,)."""
    magnitude = jacobian.abs().sum(dim=0)
    purity = 0.5 * (1 + torch.where(magnitude > 0, jacobian.sum(dim=0) / magnitude, 0.0))
    chosen = torch.where(jacobian > 0, purity > u, purity < u)
    return (jacobian * (leak + (1 - leak) * chosen)).sum(dim=0)
