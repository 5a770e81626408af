"""Apply a loss balancer and differentiate its output with respect to the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..engine.accumulate import without_hooks
from ..engine.gramian import loss_jacobian
from ..engine.graph import trace
from ..engine.nodes import LeafNode, has_hooks
from ..engine.sample_axis import is_elementwise
from .report import Report
from .weighted import weighted_losses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..engine.accumulate import LeafGradient
    from ..engine.graph import Trace
    from ..rules.protocol import LossBalancer
    from ..types import Gramian, Losses, WeightedLosses, Weights
    from .arguments import StepLosses


class Weighting(NamedTuple):
    """Linear map from the gradients of the raw losses to the gradients of the weighted losses.

    Attributes:
        matrix: Derivative of the weighted losses with respect to the losses. Shape (K, K), or its diagonal (K,).
        is_identity: Whether the weighted losses are the losses; the diagonal is then 1.
    """

    matrix: Tensor
    is_identity: bool = False

    @property
    def sums(self) -> Weights:
        """Weight of each raw loss in the sum of the weighted losses. Shape (K,)."""
        return self.matrix if self.matrix.ndim == 1 else self.matrix.sum(dim=0)

    @property
    def full_matrix(self) -> Tensor:
        """The derivative as a matrix. Shape (K, K)."""
        return self.matrix.diag() if self.matrix.ndim == 1 else self.matrix

    def gramian(self, gramian: Gramian) -> Gramian:
        """Return the Gramian of the weighted losses, given the Gramian of the raw losses. Shape (K, K)."""
        if self.is_identity:
            return gramian
        E = self.matrix
        if E.ndim == 2 and torch.equal(E, E.diagonal().diag()):  # the same numbers as the products of matrices
            E = E.diagonal()
        return E[:, None] * gramian * E if E.ndim == 1 else E @ gramian @ E.T

    def rows(self, positions: Tensor) -> Weighting:
        """Return the map to the gradients of some weighted losses only, in ascending order. Shape (k,) -> a matrix (k, K)."""
        return self if len(positions) == len(self.matrix) else Weighting(self.full_matrix[positions])

    def pull_back(self, weights: Weights) -> Weights:
        """Return weights of raw gradients with the direction of the given weights of weighted gradients. Shape (K,)."""
        if self.is_identity:
            return weights
        return weights * self.matrix if self.matrix.ndim == 1 else weights @ self.matrix


class WeightedStep(NamedTuple):
    """Weighted losses of one step and their derivatives, detached."""

    weighted: WeightedLosses
    weighting: Weighting
    parameters: list[Tensor]  # of the loss balancer
    parameter_gradients: Sequence[Tensor | None]  # of the plain sum of the weighted losses

    @property
    def loss_weights(self) -> Weights:
        """Weight of each raw loss in the sum of the weighted losses. Shape (K,), float64."""
        return self.weighting.sums

    def parameter_pairs(self, factor: float = 1.0) -> list[LeafGradient]:
        """Return the loss balancer's parameters and the gradients of the plain sum of the weighted losses, times a factor."""
        pairs = zip(self.parameters, self.parameter_gradients, strict=True)
        return [
            (parameter, gradient if factor == 1.0 else factor * gradient)
            for parameter, gradient in pairs
            if gradient is not None
        ]

    def report(
        self,
        step: StepLosses,
        weights: Weights | None,
        gramian: Gramian | None,
        unshared: tuple[str, ...] = (),
        total: Weights | None = None,
    ) -> Report:
        """Return the record of a step with these weighted losses."""
        losses = step.losses.detach()
        loss_weights = self.loss_weights.to(losses.device, torch.promote_types(losses.dtype, torch.float32))
        weights = None if weights is None else weights.to(losses)
        total = None if total is None else total.to(loss_weights)
        return Report(step.tasks, losses, self.weighted.to(losses), loss_weights, weights, gramian, unshared, total)


def weighted_step(rule: LossBalancer, step: StepLosses) -> WeightedStep:
    """Apply a loss balancer to detached losses and differentiate its output.

    Args:
        rule: The loss balancer.
        step: The losses of the step.

    Returns:
        Weighted losses and derivatives.

    Raises:
        ValueError: As `weighted_losses`.
    """
    losses = step.losses.detach()
    if step.is_half and losses.device.type != "mps":  # the only device without float64
        losses = losses.double()  # the weight of a small loss overflows in half precision
    losses.requires_grad_()
    weighted = weighted_losses(rule, step, losses)
    if weighted is losses:
        ones = torch.ones(len(losses), dtype=torch.float64, device="cpu")
        return WeightedStep(losses.detach(), Weighting(ones, is_identity=True), [], ())
    graph = trace([weighted])
    parameters = [tensor for tensor in graph.leaves if tensor is not losses and tensor.requires_grad]
    with without_hooks(parameters):  # these hooks act when the gradients are accumulated
        E, *gradients = torch.autograd.grad(weighted.sum(), [losses, *parameters], retain_graph=True, allow_unused=True)
    if E is None or not _is_separable(graph, losses):
        E = loss_jacobian(weighted, losses)
    return WeightedStep(weighted.detach(), Weighting(E.to("cpu", torch.float64)), parameters, gradients)


def _is_separable(graph: Trace, losses: Losses) -> bool:
    """Return whether each weighted loss depends on only one loss, so that the sum of them has all derivatives."""
    operations = [node for node in graph.users if type(node) is not LeafNode]
    return all(is_elementwise(node, losses.shape) and not has_hooks(node) for node in operations)
