"""Rules for physics-informed networks, which balance the lengths of the task gradients: NTK weights and moving averages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from ..rules.context import TaskError
from ..rules.registry import gradient_balancers
from ..solvers.linear_algebra import gradient_norms
from ._host import solve
from ._state import indices, loss_values, numbers_by_task, read, vector, write

if TYPE_CHECKING:
    from torch import Tensor

    from ..solvers.linear_algebra import Array
    from ..types import Direction, Gramian, Jacobian, Weights

Estimate = Literal["quotient", "root"]


@gradient_balancers.register(
    "inverse_norm",
    heads="weighted",
    label="Gradient norm weights",
    paper="Wang et al. 2023, https://arxiv.org/abs/2308.08468",
    remedies=("gradient length",),
    invariances=("permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients"),
)
class InverseNorm(nn.Module):
    r"""Weights that are inversely proportional to the lengths of the gradients, averaged over time.

    .. math:: \lambda_k \leftarrow \beta \lambda_k + (1 - \beta) \frac{\sum_j n_j}{n_k}, \qquad n_k = \lVert g_k \rVert

    All λ are 1 before the first step. With β = 0 every weighted gradient has the same length, the sum of all lengths. A task
    whose gradient is zero keeps its λ and takes no part in the sum. With β = 0 a single task has weight 1, and with any other β
    too. The weights do not change when all gradients are multiplied by one constant.

    Args:
        num_tasks: Number of tasks, K.
        beta: β in 0..1, 1 excluded.

    Raises:
        ValueError: If ``beta`` is out of range.

    Source:
        Wang, Sankaran, Wang & Perdikaris, "An Expert's Guide to Training Physics-informed Neural Networks", 2023, algorithm 1.
        Differs: λ is updated at every step, where the paper does so every 1000 steps; ``compose.every`` makes updates
        rarer. The authors' code has the mean of the lengths in place of the sum, a constant factor.
    """

    weights: Tensor

    def __init__(self, num_tasks: int, beta: float = 0.9) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"beta of 'inverse_norm' must be in 0..1, 1 excluded, but got {beta}.")
        self.beta = beta
        self.register_buffer("weights", vector(num_tasks, 1.0))

    def forward(self, gramian: Gramian, present: Tensor | None = None) -> Weights:
        """Return the averages, with this step included.

        Args:
            gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
            present: Indices of the tasks; None for all.

        Returns:
            Positive weights. Shape (K,), dtype and device of ``gramian``.

        Raises:
            ValueError: If ``gramian`` is not a finite square matrix.
        """
        tasks = indices(present, self.weights)
        return solve(lambda G: self._step(gradient_norms(G), tasks), gramian)

    def _step(self, norms: Array, tasks: Tensor) -> Array:
        weights = read(self.weights, tasks)
        nonzero = norms > 0
        weights[nonzero] = self.beta * weights[nonzero] + (1 - self.beta) * norms.sum() / norms[nonzero]
        write(self.weights, tasks, weights)
        return weights


@gradient_balancers.register(
    "ntk",
    heads="weighted",
    label="NTK weights",
    paper="Wang, Yu & Perdikaris 2022, https://arxiv.org/abs/2007.14527",
    remedies=("training pace", "gradient length"),
    needs=("positive losses",),
    invariances=("permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients"),
)
def ntk(
    gramian: Gramian,
    *,
    losses: Tensor | None = None,
    present: Tensor | None = None,
    estimate: Estimate = "quotient",
    residuals: list[int] | None = None,
) -> Weights:
    r"""Return weights that let losses which are means of squares fall equally fast, by their neural tangent kernels.

    .. math:: \lambda_k = \frac{\sum_j t_j}{t_k}, \qquad t_k = N_k^2 \frac{G_{kk}}{4 L_k}

    The paper has the trace of the kernel in place of t. Let :math:`L = \tfrac1N \sum_i r_i^2` be the loss of a task with
    residuals r, and :math:`K = \nabla r \nabla r^\top` the kernel of shape (N, N). Then
    :math:`G_{kk} = \tfrac4{N^2} r^\top K r`, so that

    .. math:: t = N \frac{r^\top K r}{r^\top r}

    is N times a Rayleigh quotient. It **equals the trace** if the gradients of the residuals are orthogonal and of one length,
    in particular for one residual. It equals the trace in expectation, up to the randomness of :math:`r^\top r`, if the
    residuals are uncorrelated with one variance. Otherwise it lies between N times the least and N times the greatest
    eigenvalue. The trace itself would need the gradient of every residual.

    Use the rule without a loss balancer, since t needs the gradient of the raw loss. The factor 4 cancels, and so does any
    common constant of all losses, such as ½. A task whose gradient is zero gets weight 0
    and takes no part in the sum. One task has weight 1. There is no average over time: use ``compose.smoothed``.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
        losses: Values of the losses, positive where a gradient is not zero; None for ones. Shape (K,).
        present: Indices of the tasks; None for all.
        estimate: ``"quotient"``: t as above. ``"root"``: its square root, as in PhysicsNeMo-Sym.
        residuals: N for every task; None: equal numbers, which cancel. The losses must then be means, not sums, of squares.

    Returns:
        Non-negative weights. Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix, or ``residuals`` is wrong.
        TaskError: If a loss is not positive though its gradient is not zero.

    Source:
        Wang, Yu & Perdikaris, "When and why PINNs fail to train: A neural tangent kernel perspective", J. Comput. Phys. 2022,
        algorithm 1. Differs: the estimate of the trace. PhysicsNeMo-Sym takes the lengths of the gradients of the square roots
        of the losses, which are the square roots of t at equal N.
    """
    N = numbers_by_task(residuals, "residuals", "ntk", len(gramian), present)

    def weights(G: Array) -> Array:
        squares = np.maximum(G.diagonal(), 0.0)
        nonzero = squares > 0
        L = loss_values(losses, len(G), "ntk", "divides by it", zero=True)
        if (L[nonzero] == 0).any():
            task = int((nonzero & (L == 0)).argmax())
            raise TaskError(task, "Loss of task {task} is 0, but its gradient is not. 'ntk' is for means of squares.")
        t = N[nonzero] ** 2 * squares[nonzero] / L[nonzero]
        if estimate == "root":
            t = np.sqrt(t)
        result = np.zeros(len(G))
        result[nonzero] = t.sum() / t
        return result

    return solve(weights, gramian)


@gradient_balancers.register(
    "lr_annealing",
    sees="jacobian",
    heads="unweighted",
    label="Learning rate annealing",
    paper="Wang, Teng & Perdikaris 2021, https://arxiv.org/abs/2001.04536",
    remedies=("gradient length", "domination"),
    invariances=("scales_with_the_gradients",),
)
class LRAnnealing(nn.Module):
    r"""Weights that bring the mean entry of every gradient to the greatest entry of the main task's gradient.

    .. math:: \lambda_k \leftarrow \beta \lambda_k + (1 - \beta) \frac{\max |g_{\text{main}}|}{\operatorname{mean} |g_k|},
              \qquad d = g_{\text{main}} + \sum_{k \ne \text{main}} \lambda_k g_k

    In a physics-informed network, the main task is the residual of the differential equation, the others are boundary and
    initial conditions. All λ are 1 before the first step. A task whose gradient is zero keeps its λ. Where the main gradient
    is zero, the λ shrink. One task has the direction g. The direction is not a function of the Gramian.

    Args:
        num_tasks: Number of tasks, K.
        beta: β in 0..1, 1 excluded.
        main_task: Index of the main task, which must be present at each step.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Wang, Teng & Perdikaris, "Understanding and mitigating gradient flow pathologies in physics-informed neural networks",
        SIAM J. Sci. Comput. 2021, algorithm 1. β = 0.9 is the weight of the old value, as in the authors' code; in the paper's
        algorithm 0.9 is the weight of the new value. Differs: the code updates λ every 10 steps.
    """

    weights: Tensor

    def __init__(self, num_tasks: int, beta: float = 0.9, main_task: int = 0) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"beta of 'lr_annealing' must be in 0..1, 1 excluded, but got {beta}.")
        if not 0 <= main_task < num_tasks:
            raise ValueError(f"main_task of 'lr_annealing' must be in 0..{num_tasks - 1}, but got {main_task}.")
        self.beta = beta
        self.main_task = main_task
        self.register_buffer("weights", vector(num_tasks, 1.0))

    def forward(self, jacobian: Jacobian, present: Tensor | None = None) -> Direction:
        """Return the direction of one step.

        Args:
            jacobian: Rows are task gradients. Shape (K, P).
            present: Indices of the tasks; None for all.

        Returns:
            Shape (P,), dtype and device of ``jacobian``.

        Raises:
            ValueError: If ``jacobian`` is not a matrix, or the main task is absent.
        """
        if jacobian.ndim != 2:
            raise ValueError(f"jacobian must have shape (K, P), but got {tuple(jacobian.shape)}.")
        tasks = indices(present, self.weights)
        is_main = (tasks == self.main_task).cpu().numpy()
        if not is_main.any():
            raise ValueError(f"The main task of 'lr_annealing', number {self.main_task}, must be present at each step.")
        if jacobian.shape[1] == 0:
            return jacobian.new_zeros(0)
        sums = torch.linalg.vector_norm(jacobian, ord=1, dim=1, dtype=torch.float64).cpu().numpy()
        greatest = float(jacobian[int(is_main.argmax())].abs().max())
        weights = read(self.weights, tasks)
        changes = ~is_main & (sums > 0)
        target = greatest * jacobian.shape[1] / sums[changes]
        weights[changes] = self.beta * weights[changes] + (1 - self.beta) * target
        write(self.weights, tasks, weights)
        return torch.from_numpy(weights).to(jacobian) @ jacobian
