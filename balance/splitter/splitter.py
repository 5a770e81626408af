"""Splitter: balancing inside one ordinary backward pass, anywhere in a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..distributed.ranks import Ranks
from ..engine.trees import map_leaves
from ..messages import unknown
from ..rules.build import build_gradient_balancer, check_source
from ..rules.casting import preserving
from ..rules.context import Context
from ..rules.generator import SeededGenerator
from ..rules.options import describe
from ..rules.protocol import GradientBalancer, JacobianBalancer
from ..rules.registry import gradient_balancers
from ..rules.task_names import check_tasks, encode_tasks
from ..stage.arguments import task_names
from ..stage.loss_weighting import Weighting
from ..stage.report import Report
from .arguments import check_beta, check_scaler, read_projection, read_weights, tensors_of
from .feature_gradients import FeatureGradients, Sums, sum_over_ranks
from .function import PassMemory, Split, num_samples
from .per_sample import inner_products, project_samples, shortest_between
from .rule_merging import merge_by_rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.amp.grad_scaler import GradScaler
    from torch.distributed import ProcessGroup

    from ..types import GradientRule, Gramian, Weights
    from .arguments import Projection, ProjectionNumber

_SHORTEST = 1e-30  # root mean square length that a gradient is divided by at least: its inverse is a float32
_BETA = 0.999


class Splitter(nn.Module):
    r"""A module that gives every task a view of the features, and balances the tasks' gradients where the views meet again.

    The forward pass is the identity, K times. In the backward pass the gradient :math:`g_k` of the features arrives from
    every task k, and the trunk gets

    .. math:: d = \sum_k \frac{w_k}{\sum_j w_j} \frac{g_k}{\sqrt{v_k}}, \qquad v_k = \frac{m_k}{1 - \beta^{t_k}}, \qquad
              m_k \leftarrow \beta m_k + (1 - \beta) q_k

    where :math:`q_k` is the squared length of a sample's gradient, averaged over the batch, and :math:`t_k` counts the updates
    of :math:`m_k`. A constant positive factor on a task's loss changes only the gradients of its head. So give the weights
    to the splitter, not to the losses. Lengths are of order 1 for every sample and every size of the batch. So the trunk's
    learning rate gets another meaning, unless the optimizer ignores the scale, as Adam does.

    With a gradient balancer, :math:`d = \sum_k w_k g_k`. The weights are for the Gramian of the :math:`g_k`, in which every
    sample counts separately. It is the step of ``Balancer(source="features", heads="unweighted")``, in one backward pass.

    A splitter is an autograd function. So a network can have several splitters, at any place, even one below the other, with
    any optimizer and under autocast. Gradients of half precision are merged in float32, Gramians are float64. The gradients of
    all tasks are kept until the last has arrived. Heads get their ordinary gradients.

    State changes once for each forward pass, in the first backward pass that brings a task's gradient. So with gradient
    accumulation it changes once for each ``backward()``. A second backward pass over a graph changes nothing and gives equal
    gradients again. Gradients taken one task at a time (``torch.autograd.grad`` of each loss) are balanced separately. With
    the normalisation and without projections they add up to the gradients of one pass, and the state changes once.

    A task whose view no loss reaches is absent: a gradient balancer sees the smaller problem, and the task's state does not
    change. The normalisation still divides by the weights of all tasks. A moving average does not change where the gradient
    is exactly zero. Where any gradient is infinite or NaN no state changes, and the trunk gets NaN, which a GradScaler needs.
    If a reentrant checkpoint (``use_reentrant=True``) contains the splitter but not the heads, torch replaces the missing
    gradients by zeros. An absent task is then present, with gradient zero.

    Under ``torch.distributed`` squared lengths and Gramians are summed over all ranks, in every backward pass, in a process
    group that nothing else uses. The sum is exact, since different samples are different coordinates. So all ranks compute
    equal weights, and their states stay equal bit for bit. Task k's loss is :math:`L_k = \frac{1}{W} \sum_r L_k^r` over the
    W ranks, and the loss of a task that is absent on a rank is zero there. DistributedDataParallel and FSDP2 average the
    gradients in this way. A Balancer, in contrast, weights the ranks by their numbers of samples.

    Every rank must run every forward and backward pass. On a rank where no loss reaches any view the others would wait
    without end: there, add ``(view * 0).sum()`` of one view to the loss. The view's task then counts as present.

    Args:
        tasks: Names of the tasks, or their number K (the names are then "0", "1", ...).
        gradient: ``"normalized"``: the formula above. None: the formula without :math:`\sqrt{v_k}`, a weighted mean.
            Otherwise a registered gradient balancer, or any callable from a Gramian (K, K) to weights (K,).
        gradient_options: Options of a registered gradient balancer.
        weights: Weight of each task, not negative, by name or in order; ones by default. A gradient balancer sees the
            gradients times these weights, as if the losses were weighted.
        projection: Projection without a gradient balancer, sample by sample; the published code's number is accepted too.
            ``"none"`` (0). ``"after_norm"`` (1): every task's gradient is projected off the gradients that it conflicts with,
            in random order, after the normalisation. ``"shortest"`` (2), for two tasks only: the shortest vector between the
            two normalised gradients. ``"before_norm"`` (3): the projection comes before the normalisation, which uses the
            lengths of the projected gradients.
        beta: Memory of the moving averages, in 0..1, 1 excluded.
        seed: Seed of rules and projections that draw; a Balancer with an equal seed draws equal numbers.
        scaler: The GradScaler of mixed-precision training, which requires it: a rule then sees unscaled gradients and the
            trunk gets scaled ones. Without it the normalisation would undo the scale, and the scaler would divide by it again.
            A scaler that is created later can be assigned: ``splitter.scaler = scaler``.
        process_group: The data-parallel processes under ``torch.distributed``; None: all processes. Needed only next to tensor
            or pipeline parallelism. A copy that is unpickled in another process uses all processes.

    Raises:
        ValueError: If a name, an option or a choice is unknown, out of range, or without effect.
        TypeError: If something has the wrong type.

    Source:
        ``NormalizedMultiTaskSplitter`` of guillaumeBellec/multitask (package torchmultitask), after the balancer of
        Défossez et al., "High Fidelity Neural Audio Compression", 2022. Differs: the averages are replaced, never changed
        in place, so that a graph can be walked twice. They are float64, with no epsilon but 1e-30. Samples are flattened for
        the shortest vector, features may be of one dimension, and K may be 1. Random orders come from a separate generator.
        Gradients that are not finite leave no trace. Exact over ranks; gradient balancers.
    """

    squares: Tensor
    counts: Tensor
    weights: Tensor

    def __init__(
        self,
        tasks: Sequence[str] | int,
        gradient: str | GradientRule | None = "normalized",
        *,
        gradient_options: Mapping[str, Any] | None = None,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        projection: Projection | ProjectionNumber = "none",
        beta: float = _BETA,
        seed: int = 0,
        scaler: GradScaler | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.tasks = task_names(tasks)
        self.projection = read_projection(projection, len(self.tasks))
        check_beta(beta)
        self.beta, self.scaler, self.ranks = beta, scaler, Ranks(process_group)
        self.normalizes = isinstance(gradient, str) and gradient == "normalized"
        self.gradient_balancer: GradientBalancer | JacobianBalancer | None = None
        if gradient is not None and not self.normalizes:
            self.gradient_balancer = self._build(gradient, gradient_options, seed)
        elif gradient_options:
            raise ValueError(
                f"gradient_options need a gradient balancer, but got {dict(gradient_options)} and gradient={gradient!r}."
            )
        self._description = describe(gradient, gradient_options)
        if self.projection in ("after_norm", "before_norm"):
            self.random = SeededGenerator(2 * seed + 1)
        # Moving averages of the squared lengths, and the numbers of their updates
        self.register_buffer("squares", torch.zeros(len(self.tasks), dtype=torch.float64, device="cpu"))
        self.register_buffer("counts", torch.zeros(len(self.tasks), dtype=torch.int64, device="cpu"))
        self.register_buffer("weights", read_weights(weights, self.tasks), persistent=False)
        self._report: Report | None = None

    @property
    def report(self) -> Report | None:
        """Record of the last backward pass; None before the first.

        The direction is the sum of the gradients times ``loss_weights`` (the weights of the tasks) times
        ``gradient_weights``. These are None if the batch as a whole has no such weights. ``gramian`` is of the gradients
        times ``loss_weights``. The losses are NaN, since a splitter gets no losses.
        """
        return self._report

    @property
    def scaler(self) -> GradScaler | None:
        """The GradScaler of mixed-precision training; None without.

        It can be assigned at any time; the next backward pass uses it. A copy of the splitter has a copy of the scaler, so
        assign the scaler again.
        """
        return self._scaler

    @scaler.setter
    def scaler(self, scaler: GradScaler | None) -> None:
        check_scaler(scaler)
        self._scaler = scaler

    def forward(self, features: Any) -> dict[str, Any]:
        """Return a view of the features for each task; in evaluation the features themselves.

        Args:
            features: A tensor, or tuples, lists and dicts of tensors, which are balanced together. Tensors that require no
                gradient are returned unchanged. Samples are along the first dimension.

        Returns:
            By task, a structure like ``features``. Views share their memory and must not be changed in place.

        Raises:
            TypeError: If an entry is not a tensor of floats.
            ValueError: If there is no tensor, or samples must be distinguished and the tensors have different numbers of them.
        """
        tensors = tensors_of(features)
        live = list({id(z): z for z in tensors if z.requires_grad}.values())
        if self.training and not torch.is_grad_enabled():  # a reentrant checkpoint needs a different tensor for every task
            return {task: map_leaves(lambda z: z.view_as(z), features) for task in self.tasks}
        if not (live and self.training):
            return dict.fromkeys(self.tasks, features)
        self._check_samples(live)
        self.ranks.connect()  # in the backward pass a wrapper's collectives could come in between
        views = Split.apply(self, *live)  # type: ignore[no-untyped-call]
        by_task = [dict(zip(map(id, live), views[k :: len(self.tasks)], strict=True)) for k in range(len(self.tasks))]
        return {task: _with_views(features, view) for task, view in zip(self.tasks, by_task, strict=True)}

    def merge(self, gradients: FeatureGradients, memory: PassMemory) -> list[Tensor | None]:
        """Balance the gradients of one backward pass.

        Args:
            gradients: Gradients of the features, by tensor and task.
            memory: Results of the first backward pass over the graph.

        Returns:
            The gradient of each feature tensor, flat; None for an unreached tensor.
        """
        scale = self.scaler.get_scale() if self.scaler is not None and self.scaler.is_enabled() else 1.0
        if self.gradient_balancer is not None:
            merged = merge_by_rule(self.gradient_balancer, gradients, memory, self.weights, self.tasks, scale, self.ranks)
            if merged.gramian is not None:
                self._record(merged.present, self.weights.to(gradients.indices.device), merged.weights, merged.gramian)
            return merged.pieces
        if self.projection != "none":
            return self._merge_samples(gradients, memory, scale)
        squares = gradients.rows.squares(gradients.indices.device)
        sums = sum_over_ranks(squares, None, gradients, len(self.tasks), self.ranks)
        scales = self._scales(sums, scale, memory)
        return gradients.combined(scales[gradients.indices])

    def get_extra_state(self) -> Tensor:
        """Return the task names, so that a checkpoint is not loaded into a splitter for other tasks. Shape (n,), uint8."""
        return encode_tasks(self.tasks)

    def set_extra_state(self, state: Tensor) -> None:
        """Check the tasks of a checkpoint.

        Raises:
            ValueError: If they differ from the tasks of this splitter.
        """
        check_tasks(state, self.tasks, "Splitter")

    def __repr__(self) -> str:
        parts = [repr(self.tasks), f"gradient={self._description}"]
        if (self.weights != 1).any():
            parts.append(f"weights={dict(zip(self.tasks, self.weights.tolist(), strict=True))}")
        if self.projection != "none":
            parts.append(f"projection={self.projection!r}")
        if self.beta != _BETA:
            parts.append(f"beta={self.beta}")
        return f"Splitter({', '.join(parts)})"

    def _build(
        self, gradient: str | GradientRule, options: Mapping[str, Any] | None, seed: int
    ) -> GradientBalancer | JacobianBalancer:
        if self.projection != "none":
            raise ValueError(
                f"projection={self.projection!r} is for gradient='normalized' or None, but got {gradient!r}. Leave it out."
            )
        if isinstance(gradient, str) and gradient not in gradient_balancers:
            raise ValueError(unknown("gradient balancer", gradient, (*gradient_balancers.names(), "normalized")))
        check_source(gradient, features=True, losses=False)
        rule = build_gradient_balancer(gradient, options, num_tasks=len(self.tasks), seed=2 * seed + 1)
        if rule.uses_losses and rule.sees == "gramian" and not rule.learns:
            try:
                rule(torch.eye(len(self.tasks), dtype=torch.float64, device="cpu"), Context.of_all(len(self.tasks)))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"A Splitter sees no losses, but {gradient!r} fails without: {error} Use a Balancer."
                ) from None
        return rule

    def _check_samples(self, tensors: Sequence[Tensor]) -> None:
        lengths = {num_samples(z) for z in tensors}
        if len(lengths) > 1 and (self.normalizes or self.projection != "none"):
            raise ValueError(
                f"Features must have samples along the first dimension, but it has sizes {sorted(lengths)}. Use one "
                "Splitter for each tensor, or a gradient balancer, which needs no samples."
            )

    def _merge_samples(self, gradients: FeatureGradients, memory: PassMemory, scale: float) -> list[Tensor | None]:
        """Apply a projection, sample by sample."""
        samples = gradients.samples()  # (B, k, f) each
        C = inner_products(samples, gradients.indices.device)  # (B, k, k)
        before = None if self.projection == "shortest" or memory.orders else self.random.get_extra_state()
        A, squares = None, C.diagonal(dim1=1, dim2=2).sum(dim=0)
        if self.projection == "before_norm":
            A = project_samples(C, self._orders(gradients.tasks, memory))  # (B, k, k)
            squares = ((A @ C) * A).sum(dim=(0, 2))  # of the projected gradients
        sums = sum_over_ranks(squares, C.sum(dim=0), gradients, len(self.tasks), self.ranks)
        scales = self._scales(sums, scale, memory)[gradients.indices]
        if not sums.finite:
            if before is not None:  # the pass must not change the generator
                self.random.set_extra_state(before)
                memory.orders = None
            return gradients.combined(scales * math.nan)
        if A is not None:
            coefficients = scales @ A  # (B, k)
        else:
            coefficients = self._merged(gradients.tasks, memory)(scales[:, None] * C * scales) * scales
        return [(coefficients.to(J)[:, None] @ J).flatten() for J in samples]

    def _merged(self, tasks: list[int], memory: PassMemory) -> Callable[[Tensor], Tensor]:
        """Return a function from the samples' Gramians to the coefficients of the gradients. Shape (B, k, k) -> (B, k)."""
        if self.projection == "shortest":
            return shortest_between
        return lambda C: project_samples(C, self._orders(tasks, memory)).sum(dim=1)

    def _scales(self, sums: Sums, scale: float, memory: PassMemory) -> Tensor:
        """Return the weight of each task over its length; NaN where a gradient is not finite. Shape (K,)."""
        weights = (self.weights / self.weights.sum()).to(sums.squares)
        stretch = torch.where(sums.finite, torch.ones_like(weights), math.nan)
        if self.normalizes:
            stretch = self._normalize(sums.squares / (scale**2 * max(sums.batch, 1.0)), sums.finite, memory)
        G = None if sums.gramian is None else Weighting(weights).gramian(sums.gramian) / scale**2
        self._record(sums.tasks, weights, None if self.projection != "none" else stretch, G)
        return weights * stretch

    def _normalize(self, means: Tensor, finite: Tensor, memory: PassMemory) -> Tensor:
        """Update the moving averages, once for each graph and task, and return the inverse lengths. Shape (K,)."""
        squares, counts = self.squares.to(means), self.counts.to(means.device)
        counted, divisors = memory.averages or (torch.zeros_like(counts, dtype=torch.bool), torch.zeros_like(squares))
        new = finite & (means > 0) & ~counted
        self.squares = torch.where(new, self.beta * squares + (1 - self.beta) * means, squares)
        self.counts = counts + new
        averages = torch.where(counted, divisors, self.squares / (1 - self.beta ** self.counts.clamp(min=1).to(means)))
        memory.averages = (counted | new, averages)
        stretch = torch.where(averages > 0, 1 / averages.sqrt().clamp(min=_SHORTEST), 0.0)
        return torch.where(finite, stretch, math.nan)

    def _orders(self, tasks: list[int], memory: PassMemory) -> Tensor:
        """Return in row i the other tasks in the order in which task i meets them, indices into ``tasks``. Shape (k, k - 1)."""
        if memory.orders is None:
            memory.orders = self.random.permutations(len(self.tasks), len(self.tasks)).tolist()
        positions = {task: i for i, task in enumerate(tasks)}
        orders = [[positions[j] for j in memory.orders[i] if j in positions and j != i] for i in tasks]
        return torch.tensor(orders, dtype=torch.int64, device="cpu")

    def _record(self, present: list[int], weights: Tensor, stretch: Weights | None, gramian: Gramian | None) -> None:
        if len(present) < len(self.tasks):
            weights = weights[present]
            gramian = None if gramian is None else gramian[present][:, present]
            stretch = None if stretch is None else stretch[present]
        unseen = torch.full_like(weights, math.nan)
        self._report = Report(tuple(self.tasks[k] for k in present), unseen, unseen, weights.clone(), stretch, gramian)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Splitter:  # noqa: FBT001, FBT002
        """Move or cast, as ``.to()`` and ``.half()`` ask, without a change of state."""
        super()._apply(preserving(self, fn), recurse)  # type: ignore[no-untyped-call]
        return self


def _with_views(features: Any, views: Mapping[int, Tensor]) -> Any:
    """Return a structure like ``features`` with views, given by the ids of the tensors that they replace."""
    return map_leaves(lambda tensor: views.get(id(tensor), tensor), features)
