"""Rules that average the task gradients over time, in a buffer of the size of the Jacobian: MoCo, DB-MTL and M-ConFIG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from ..rules.registry import gradient_balancers
from ..solvers.linear_algebra import equal_projection_weights
from ..solvers.simplex import project_on_simplex
from ._host import without_zero_gradients
from ._memory import GradientMemory, inner_products
from ._state import indices, loss_values, read, share_of, vector, write

if TYPE_CHECKING:
    from torch import Tensor

    from ..solvers.linear_algebra import Array
    from ..types import Direction, Jacobian

Normalization = Literal["loss", "none"]


@gradient_balancers.register(
    "moco",
    sees="jacobian",
    heads="unweighted",
    label="MoCo",
    paper="Fernando et al. 2023, https://arxiv.org/abs/2210.12624",
    remedies=("conflict",),
    needs=("positive losses", "parameters"),
    invariances=("permutation_equivariant", "rotation_equivariant"),
)
class MoCo(nn.Module):
    r"""A convex combination of averaged task gradients, with weights that descend on its length.

    .. math:: y_k \leftarrow y_k - \beta_t (y_k - h_k), \qquad
              w \leftarrow \Pi_\Delta \bigl( w - \gamma_t (Y Y^\top + \rho I) w \bigr), \qquad d = Y^\top w

    with :math:`\beta_t = \beta / t^{\sigma_\beta}` and :math:`\gamma_t = \gamma / t^{\sigma_\gamma}`. By default
    :math:`h_k = L_k g_k / \lVert g_k \rVert`, so that loss weights have no effect on the shared parameters. At first y is 0, so
    that the first directions are short, and w is 1/K. A zero gradient has h = 0. One task has weight 1. The number t counts the
    steps of a task. An absent task keeps its y and w, and the present tasks keep their sum of w.

    The rule stores K gradients.

    Args:
        num_tasks: Number of tasks, K.
        beta: β in 0..1, 0 excluded.
        beta_sigma: Exponent of the decay of β, not negative.
        gamma: γ, positive.
        gamma_sigma: Exponent of the decay of γ, not negative.
        rho: ρ ≥ 0, the pull towards equal weights.
        normalization: Length of h: the loss (``"loss"``), or the length of the gradient (``"none"``), as in the paper.
        official: Apply a softmax in place of the projection, and add 1e-8 to the lengths, as LibMTL does. This is no
            projection: it brings the weights back near 1/K at every step.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Fernando et al., "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach", ICLR 2023,
        algorithm 1. Defaults and the normalization are from LibMTL, which has them from the authors' code. Differs: the
        direction has the y and w after the step, as in LibMTL; y is not projected on a ball.
    """

    steps: Tensor
    weights: Tensor

    def __init__(
        self,
        num_tasks: int,
        beta: float = 0.5,
        beta_sigma: float = 0.5,
        gamma: float = 0.1,
        gamma_sigma: float = 0.5,
        rho: float = 0.0,
        normalization: Normalization = "loss",
        official: bool = False,  # noqa: FBT001, FBT002 - options are given by name
    ) -> None:
        super().__init__()
        if not 0 < beta <= 1:
            raise ValueError(f"beta of 'moco' must be in 0..1, 0 excluded, but got {beta}.")
        if not gamma > 0:
            raise ValueError(f"gamma of 'moco' must be positive, but got {gamma}.")
        if not min(beta_sigma, gamma_sigma, rho) >= 0:
            raise ValueError(
                f"beta_sigma, gamma_sigma and rho of 'moco' must not be negative, but got {(beta_sigma, gamma_sigma, rho)}."
            )
        self.beta, self.beta_sigma = beta, beta_sigma
        self.gamma, self.gamma_sigma, self.rho = gamma, gamma_sigma, rho
        self.normalization, self.official = normalization, official
        self.memory = GradientMemory(num_tasks, "moco")
        self.register_buffer("steps", vector(num_tasks))
        self.register_buffer("weights", vector(num_tasks, 1 / num_tasks))

    def forward(self, jacobian: Jacobian, losses: Tensor | None = None, present: Tensor | None = None) -> Direction:
        """Return the direction of one step.

        Args:
            jacobian: Rows are task gradients. Shape (K, P).
            losses: Values of the losses, not negative; None for ones. Shape (K,).
            present: Indices of the tasks; None for all.

        Returns:
            Shape (P,), dtype and device of ``jacobian``.

        Raises:
            ValueError: If ``jacobian`` is not a matrix, or P has changed.
            TaskError: If a loss is negative and the normalization needs it.
        """
        memory = self.memory.like(jacobian)
        tasks = indices(present, self.steps)
        H = self._scaled(jacobian.to(memory), losses)
        steps = read(self.steps, tasks) + 1
        rates = torch.from_numpy(self.beta / steps**self.beta_sigma).to(H)
        Y = memory[tasks.to(H.device)]
        Y = Y - rates[:, None] * (Y - H)
        w, total = share_of(read(self.weights, tasks))
        w = w - self.gamma / steps**self.gamma_sigma * (inner_products(Y).numpy() @ w + self.rho * w)
        w = softmax(w) if self.official else project_on_simplex(w)
        memory[tasks.to(H.device)] = Y
        write(self.steps, tasks, steps)
        write(self.weights, tasks, total * w)
        return (torch.from_numpy(w).to(Y) @ Y).to(jacobian)

    def _scaled(self, J: Tensor, losses: Tensor | None) -> Tensor:
        """Return the gradients, scaled to the lengths that ``normalization`` says. Shape (K, P)."""
        if self.normalization == "none":
            return J
        L = loss_values(losses, len(J), "moco", "scales the gradient to this length", zero=True)
        norms = _lengths(J)
        lengths = norms + 1e-8 if self.official else norms
        factors = np.divide(L, lengths, out=np.zeros(len(L)), where=lengths > 0)
        return torch.from_numpy(factors).to(J)[:, None] * J


@gradient_balancers.register(
    "db_mtl",
    sees="jacobian",
    heads="unweighted",
    label="DB-MTL",
    paper="Lin et al. 2023, https://arxiv.org/abs/2308.12029",
    remedies=("loss scale", "gradient length"),
    needs=("positive losses", "parameters"),
    invariances=("permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients"),
)
class DBMTL(nn.Module):
    r"""The sum of the averaged gradients of the logarithms of the losses, all brought to the length of the longest.

    .. math:: m_k \leftarrow u_k + \beta_t (m_k - u_k), \qquad u_k = g_k / L_k, \qquad
              d = \sum_k \frac{\max_j \lVert m_j \rVert}{\lVert m_k \rVert} m_k

    with :math:`\beta_t = \beta / t^\sigma`. u is the gradient of the logarithm of the loss only if g is the gradient of the raw
    loss. So use the rule without a loss balancer. At first m is 0, so that the first directions are shorter than later ones,
    by the factor 1 - β. A task whose average is zero takes no part. One task has the direction m. The number t counts the steps
    of a task. An absent task keeps its average and takes no part. Heads get the gradients of the raw losses.

    The rule stores K gradients.

    Args:
        num_tasks: Number of tasks, K.
        beta: β in 0..1, 1 excluded.
        beta_sigma: σ ≥ 0; 0 keeps β.
        epsilon: Number that is added to the losses and to the lengths, not negative; 1e-8 in LibMTL.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Lin et al., "Dual-Balancing for Multi-Task Learning", 2023, algorithm 1. Defaults are from LibMTL. Differs: ``epsilon``,
        so that short gradients are no special case; LibMTL's heads get the gradients of the logarithms.
    """

    steps: Tensor

    def __init__(self, num_tasks: int, beta: float = 0.9, beta_sigma: float = 0.0, epsilon: float = 0.0) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"beta of 'db_mtl' must be in 0..1, 1 excluded, but got {beta}.")
        if not min(beta_sigma, epsilon) >= 0:
            raise ValueError(f"beta_sigma and epsilon of 'db_mtl' must not be negative, but got {(beta_sigma, epsilon)}.")
        self.beta, self.beta_sigma, self.epsilon = beta, beta_sigma, epsilon
        self.memory = GradientMemory(num_tasks, "db_mtl")
        self.register_buffer("steps", vector(num_tasks))

    def forward(self, jacobian: Jacobian, losses: Tensor | None = None, present: Tensor | None = None) -> Direction:
        """Return the direction of one step.

        Args:
            jacobian: Rows are task gradients. Shape (K, P).
            losses: Values of the losses, positive; None for ones. Shape (K,).
            present: Indices of the tasks; None for all.

        Returns:
            Shape (P,), dtype and device of ``jacobian``.

        Raises:
            ValueError: If ``jacobian`` is not a matrix, or P has changed.
            TaskError: If a loss is not positive.
        """
        memory = self.memory.like(jacobian)
        L = loss_values(losses, len(jacobian), "db_mtl", "takes its logarithm") + self.epsilon
        tasks = indices(present, self.steps)
        steps = read(self.steps, tasks) + 1
        rates = torch.from_numpy(self.beta / steps**self.beta_sigma).to(memory)[:, None]
        U = jacobian.to(memory) / torch.from_numpy(L).to(memory)[:, None]
        M = U + rates * (memory[tasks.to(U.device)] - U)
        norms = _lengths(M)
        lengths = norms + self.epsilon
        factors = np.divide(norms.max(), lengths, out=np.zeros(len(norms)), where=lengths > 0)
        memory[tasks.to(U.device)] = M
        write(self.steps, tasks, steps)
        return (torch.from_numpy(factors).to(M) @ M).to(jacobian)


@gradient_balancers.register(
    "config_momentum",
    sees="jacobian",
    heads="unweighted",
    label="M-ConFIG",
    paper="Liu, Chu & Thuerey 2025, https://arxiv.org/abs/2408.11104",
    remedies=("conflict", "gradient length", "domination"),
    needs=("parameters",),
    invariances=("permutation_equivariant",),
)
class ConfigMomentum(nn.Module):
    r"""The direction with equal angles to the averaged gradients of all tasks, each entry divided by its typical size.

    .. math:: m_k \leftarrow \beta_1 m_k + (1 - \beta_1) g_k \;\text{for present tasks}, \qquad
              c = \operatorname{ConFIG}\bigl( m_k / (1 - \beta_1^{t_k}) \bigr), \qquad d = \frac{c}{\sqrt{\hat s} + 10^{-8}}

    ConFIG's c has the same positive cosine to every gradient, and the length :math:`\sum_k \langle m_k, c / \lVert c \rVert
    \rangle`. :math:`t_k` counts the steps of task k. :math:`\hat s` is the bias-corrected average of the squares, with decay
    :math:`\beta_2`, of the gradient whose momentum would be c. So d has the size of a step of Adam, whatever the lengths of the
    gradients. Use SGD, not an adaptive optimizer.

    An absent task keeps its average, and **the direction respects it**: each step may measure one task only, in turn. A
    task takes part from its first step on. Tasks whose average is zero take no part, and opposite averages give d = 0. With
    dependent averages the cosines are equal in the least-squares sense. One task: Adam with rate 1.

    The rule stores K + 2 gradients.

    Args:
        num_tasks: Number of tasks, K.
        beta_1: Decay of the averages, in 0..1, 1 excluded.
        beta_2: Decay of the squares, in 0..1, 1 excluded.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Liu, Chu & Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR 2025, algorithm
        1, and ``PseudoMomentumOperator`` of the authors' package ``conflictfree``. Differs: the first directions respect the
        tasks that have been present so far, where the package returns zeros until every task has been.
    """

    counts: Tensor
    steps: Tensor

    def __init__(self, num_tasks: int, beta_1: float = 0.9, beta_2: float = 0.999) -> None:
        super().__init__()
        for name, beta in (("beta_1", beta_1), ("beta_2", beta_2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} of 'config_momentum' must be in 0..1, 1 excluded, but got {beta}.")
        self.beta_1, self.beta_2 = beta_1, beta_2
        self.means = GradientMemory(num_tasks, "config_momentum")
        self.moments = GradientMemory(2, "config_momentum")  # first and second moment of the direction
        self.register_buffer("counts", vector(num_tasks))
        self.register_buffer("steps", vector(1))

    def forward(self, jacobian: Jacobian, present: Tensor | None = None) -> Direction:
        """Return the direction of one step.

        Args:
            jacobian: Rows are the gradients of the present tasks. Shape (K, P).
            present: Indices of these tasks; None for all.

        Returns:
            Shape (P,), dtype and device of ``jacobian``.

        Raises:
            ValueError: If ``jacobian`` is not a matrix, or P has changed.
        """
        means, moments = self.means.like(jacobian), self.moments.like(jacobian)
        tasks = indices(present, self.counts)
        rows = tasks.to(means.device)
        means[rows] = self.beta_1 * means[rows] + (1 - self.beta_1) * jacobian.to(means)
        write(self.counts, tasks, read(self.counts, tasks) + 1)
        self.steps += 1
        return self._divided(self._direction(means), moments).to(jacobian)

    def _direction(self, means: Tensor) -> Tensor:
        """Return ConFIG's direction of the averages of all tasks that have been present. Shapes (tasks, P), (P,)."""
        counts = read(self.counts, indices(None, self.counts))
        seen = counts.nonzero()[0]
        corrections = 1 - self.beta_1 ** counts[seen]
        M = means[torch.from_numpy(seen).to(means.device)] / torch.from_numpy(corrections).to(means)[:, None]
        weights = without_zero_gradients(_config_weights, inner_products(M).numpy())
        return torch.from_numpy(weights).to(M) @ M

    def _divided(self, direction: Tensor, moments: Tensor) -> Tensor:
        """Update the moments, and return the direction divided by its typical size. Shapes (P,), (2, P) -> (P,)."""
        t = float(self.steps)
        first = direction * (1 - self.beta_1**t)
        gradient = (first - self.beta_1 * moments[0]) / (1 - self.beta_1)
        moments[0] = first
        moments[1] = self.beta_2 * moments[1] + (1 - self.beta_2) * gradient.square()
        typical: Tensor = (moments[1] / (1 - self.beta_2**t)).sqrt() + 1e-8
        return direction / typical


def _config_weights(gramian: Array) -> Array:
    """Return ConFIG's weights of gradients that are not zero. Shape (K, K) -> (K,)."""
    weights = equal_projection_weights(gramian) / np.sqrt(gramian.diagonal())
    projections = gramian @ weights
    square = float(weights @ projections)
    result: Array = weights * projections.sum() / square if square > 0 else np.zeros(len(weights))
    return result


def _lengths(rows: Tensor) -> Array:
    """Return the lengths of some rows. Shape (K, P) -> (K,)."""
    lengths: Array = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu().numpy()
    return lengths
