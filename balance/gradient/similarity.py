"""SAM-GS: gradients of similar length get momentum, gradients of different length get one length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..rules.registry import gradient_balancers

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Direction, Jacobian

FLOOR = 1e-8  # added to the mean square of the dissimilarity at each step, as in the authors' code


@gradient_balancers.register(
    "sam_gs",
    sees="jacobian",
    heads="unweighted",
    label="SAM-GS",
    paper="Borsani et al. 2025, https://arxiv.org/abs/2506.06130",
    remedies=("gradient length", "domination"),
    invariances=("permutation_equivariant",),
)
class SimilarityAwareMomentum(nn.Module):
    r"""Similarity-aware momentum gradient surgery: one length for gradients of different length, and momentum otherwise.

    .. math:: \psi = \operatorname*{mean}_{i < j} \frac{2 n_i n_j}{n_i^2 + n_j^2}, \qquad
              d = \begin{cases} \bar n \sum_k g_k / n_k & \psi < \gamma \\
              \sum_k g_k \, |\hat m_k| / \sqrt{\hat v} & \text{otherwise} \end{cases}

    with the lengths :math:`n_k` of the gradients, their mean :math:`\bar n`, the moving average :math:`\hat m_k` of each
    gradient and the moving average :math:`\hat v` of :math:`(1 - \psi)^2`. Both averages are corrected for their start at 0,
    as in Adam. The product with :math:`|\hat m_k|` is taken at every coordinate, so the rule is not a function of the
    Gramian. In that case the direction grows with the square of the gradients.

    The direction can conflict with tasks. A task whose gradient is zero contributes nothing. Gradients that are both zero count
    as similar, and so does a single task. All averages of absent tasks stay as they are. The state is as large as K task
    gradients; it is allocated at the first step.

    Args:
        num_tasks: Number of tasks, K.
        gamma: γ in 0..1, the similarity below which the gradients get one length. 0 never does, 1 nearly always.
        beta1: Decay of the average of the gradients, in 0..1 without 1.
        beta2: Decay of the average of the dissimilarity, in 0..1 without 1.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Borsani et al., "Gradient Similarity Surgery in Multi-Task Deep Learning", 2025, and the authors' code, with the options
        of its toy problem. As there, 1e-8 is added to v at each step. Differs: the direction is not multiplied by
        K, and each task counts its own steps. The reinforcement-learning code compares each pair of tasks with γ in place of
        the mean.
    """

    momentum: Tensor | None
    dissimilarity: Tensor
    steps: Tensor

    def __init__(self, num_tasks: int, gamma: float = 0.7, beta1: float = 0.9, beta2: float = 0.99) -> None:
        super().__init__()
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma of 'sam_gs' must be in 0..1, but got {gamma}.")
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} of 'sam_gs' must be at least 0 and below 1, but got {beta}.")
        self.gamma, self.beta1, self.beta2 = gamma, beta1, beta2
        self.num_tasks = num_tasks
        zeros = torch.zeros(num_tasks + 1, dtype=torch.float64, device="cpu")
        self.register_buffer("momentum", None)  # shape (num_tasks, P)
        self.register_buffer("dissimilarity", zeros[0].clone())
        self.register_buffer("steps", zeros)  # of each task, and of the dissimilarity

    def forward(self, jacobian: Jacobian, present: Tensor | None = None) -> Direction:
        """Return the direction of one step.

        Args:
            jacobian: Rows are the gradients of the present tasks. Shape (K, P).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (P,), dtype and device of ``jacobian``.

        Raises:
            ValueError: If ``jacobian`` is not a matrix, or P differs from the earlier steps.
        """
        if jacobian.ndim != 2:
            raise ValueError(f"jacobian must have shape (K, P), but got {tuple(jacobian.shape)}.")
        tasks = torch.arange(len(jacobian), device="cpu") if present is None else present.cpu()
        J = jacobian.to(torch.promote_types(jacobian.dtype, torch.float32))
        norms = J.norm(dim=1).to("cpu", torch.float64)
        similarity = mean_similarity(norms)
        mean, deviation = self._learn(J, tasks, similarity)
        if similarity < self.gamma:
            factors = torch.where(norms > 0, norms.mean() / norms, 0.0).to(J)
            return (factors @ J).to(jacobian)
        return ((J * mean.abs()).sum(dim=0) / deviation).to(jacobian)

    def _learn(self, J: Jacobian, tasks: Tensor, similarity: float) -> tuple[Tensor, float]:
        """Update the averages; return the corrected means of the present gradients, and the root of the dissimilarity."""
        if self.momentum is None:
            self.momentum = J.new_zeros(self.num_tasks, J.shape[1])
        if self.momentum.shape[1] != J.shape[1]:
            raise ValueError(f"'sam_gs' needs as many parameters as before, {self.momentum.shape[1]}, but got {J.shape[1]}.")
        self.momentum = self.momentum.to(J)
        places = tasks.to(J.device)
        mean = self.beta1 * self.momentum[places] + (1 - self.beta1) * J
        self.momentum[places] = mean
        self.steps[tasks] += 1
        self.steps[-1] += 1
        self.dissimilarity.mul_(self.beta2).add_((1 - self.beta2) * (1 - similarity) ** 2 + FLOOR)
        steps = self.steps.cpu()
        corrected = mean / (1 - self.beta1 ** steps[tasks]).to(J)[:, None]
        return corrected, float(self.dissimilarity.cpu() / (1 - self.beta2 ** steps[-1])) ** 0.5

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state in which the momentum may have another shape than here, or be missing."""
        stored = state_dict.get(f"{prefix}momentum")
        self.momentum = None if stored is None else torch.zeros_like(stored)
        super()._load_from_state_dict(state_dict, prefix, *args)


def mean_similarity(norms: Tensor) -> float:
    """Return the mean similarity 2ab / (a² + b²) of all pairs of lengths; 1 for a single length. Shape (K,)."""
    if len(norms) == 1:
        return 1.0
    a = norms / norms.max().clamp(min=torch.finfo(norms.dtype).tiny)
    squares = a[:, None] ** 2 + a**2
    similarities = torch.where(squares > 0, 2 * a[:, None] * a / squares, 1.0)
    pairs = similarities[torch.triu_indices(len(a), len(a), offset=1).unbind()]
    return float(pairs.mean())
