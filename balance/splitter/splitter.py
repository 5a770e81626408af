"""Splitter: balancing inside one ordinary backward pass, anywhere in a network."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from balance.messages import unknown
from balance.rules.build import apply_rule, build_rule, try_out
from balance.rules.casting import preserving
from balance.rules.generator import SeededGenerator
from balance.rules.registry import check_type, checked_weights, describe, gradient_balancers, takes
from balance.rules.snapshot import restored_on_error
from balance.rules.task_names import check_tasks, encode_tasks
from balance.splitter.function import FeatureGradients, Sums, flat_gradient, num_ranks, sum_over_ranks
from balance.splitter.per_sample import project_samples, shortest_between
from balance.stage.arguments import task_names
from balance.stage.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.amp.grad_scaler import GradScaler

    from balance.types import Direction, GradientRule, Gramian, Jacobian, Sees, Weights

Variant = Literal[0, 1, 2, 3]

_SHORTEST = 1e-30  # root mean square length that a gradient is divided by at least: its inverse is a float32
_BETA = 0.999


class Splitter(nn.Module):
    r"""A module that gives every task a view of the features, and balances the tasks' gradients where the views meet again.

    The forward pass is the identity, K times. In the backward pass the gradient :math:`g_k` of the features arrives from
    every task k, and the trunk gets

    .. math:: d = \sum_k \frac{w_k}{\sum_j w_j} \frac{g_k}{\sqrt{v_k}}, \qquad v_k = \frac{m_k}{1 - \beta^{t_k}}, \qquad
              m_k \leftarrow \beta m_k + (1 - \beta) q_k

    where :math:`q_k` is the squared length of a sample's gradient, averaged over the batch, and :math:`t_k` counts the updates
    of :math:`m_k`. So a constant positive factor on a task's loss changes nothing but the gradients of its own head:
    give the weights to the splitter, not to the losses. Lengths are of order 1 for every sample, whatever the size of the
    batch, so the trunk's learning rate gets another meaning, unless the optimizer ignores the scale, as Adam does.

    With a gradient balancer, :math:`d = \sum_k w_k g_k` with its weights for the Gramian of the :math:`g_k`, in which
    every sample counts separately: the step of ``Balancer(source="features", heads="unweighted")``, in one backward pass.

    A splitter uses nothing but autograd. So a network can have several splitters, at any place, also one below the other, with
    any optimizer and under autocast. Gradients of half precision are merged in float32, Gramians are float64. The gradients of
    all tasks are kept until the last has arrived. Heads get their ordinary gradients.

    State changes once for each forward pass, in the first backward pass that brings a task's gradient; so with gradient
    accumulation it changes once for each ``backward()``. A second backward pass over the same graph changes nothing and
    gives the same gradients again. Gradients taken one task at a time (``torch.autograd.grad`` of each loss) are each balanced
    alone: with the normalisation and without projections they add up to the gradients of one pass, and the state changes once.
    A task whose view no loss reaches is absent: a gradient balancer sees the smaller problem, the normalisation still
    divides by the weights of all tasks, and the task's state does not change. Nor does a moving average where the gradient
    is exactly zero. Where any gradient is infinite or NaN no state changes, and the trunk gets NaN, which a GradScaler needs.

    Under ``torch.distributed`` squared lengths and Gramians are summed over all ranks, in every backward pass, which
    is exact since different samples are different coordinates: all ranks use the same weights as one process with the
    whole batch. The losses must be means over the local batch, the gradients of the ranks must be averaged, as
    DistributedDataParallel does, and every rank must run the backward pass.

    Args:
        tasks: Names of the tasks, or their number K (the names are then "0", "1", ...).
        gradient: ``"normalized"``, the formula above; None: the same without :math:`\sqrt{v_k}`, a weighted mean;
            a registered gradient balancer; or any callable from a Gramian (K, K) to weights (K,).
        gradient_options: Options of a registered gradient balancer.
        weights: Weight of each task, not negative, by name or in order; ones by default. A gradient balancer sees the
            gradients times these weights, as if the losses were weighted.
        variant: Projections without a gradient balancer, sample by sample. 0: none. 1: every task's gradient is projected off
            the gradients that it conflicts with, in random order, after the normalisation. 3: the same before the
            normalisation, so that the lengths are those of the projected gradients. 2, for two tasks only: the shortest
            vector between the two normalised gradients.
        beta: Memory of the moving averages, in 0..1, 1 excluded.
        seed: Seed of rules and variants that draw; a Balancer with the same seed draws the same.
        scaler: The GradScaler of mixed-precision training, which requires it: a rule then sees unscaled gradients and the
            trunk gets scaled ones. Without it the normalisation would undo the scale, and the scaler would divide by it again.

    Raises:
        ValueError: If a name, an option or a choice is unknown, out of range, or without effect.
        TypeError: If something has the wrong type.

    Source:
        ``NormalizedMultiTaskSplitter`` of guillaumeBellec/multitask (package torchmultitask), after the balancer of
        Défossez et al., "High Fidelity Neural Audio Compression", 2022. Differs: the averages are replaced, never changed
        in place, so that a graph can be walked twice; they are float64, with no epsilon but 1e-30; samples are flattened
        for variant 2; features may be of one dimension, K may be 1; random orders come from a separate generator; gradients
        that are not finite leave no trace; exact over ranks; gradient balancers.
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
        variant: Variant = 0,
        beta: float = _BETA,
        seed: int = 0,
        scaler: GradScaler | None = None,
    ) -> None:
        super().__init__()
        self.tasks = task_names(tasks)
        _check_options(variant, beta, scaler, len(self.tasks))
        self.variant, self.beta, self.scaler = variant, beta, scaler
        self.normalizes = isinstance(gradient, str) and gradient == "normalized"
        self.rule: Any = None
        self.sees: Sees = "gramian"
        if gradient is not None and not self.normalizes:
            self._build(gradient, gradient_options, seed)
        elif gradient_options:
            raise ValueError(
                f"gradient_options need a gradient balancer, but got {dict(gradient_options)} and gradient={gradient!r}."
            )
        self._gradient = describe(gradient, gradient_options)
        if variant in (1, 3):
            self.random = SeededGenerator(2 * seed + 1)
        # Moving averages of the squared lengths, and the numbers of their updates
        self.register_buffer("squares", torch.zeros(len(self.tasks), dtype=torch.float64, device="cpu"))
        self.register_buffer("counts", torch.zeros(len(self.tasks), dtype=torch.int64, device="cpu"))
        self.register_buffer("weights", _read_weights(weights, self.tasks), persistent=False)
        self._report: Report | None = None

    @property
    def report(self) -> Report | None:
        """Record of the last backward pass; None before the first.

        The direction is the sum of the gradients times ``loss_weights`` (the weights of the tasks) times ``gradient_weights``,
        which is None if the batch as a whole has no such weights. ``gramian`` is of the gradients times ``loss_weights``. The
        losses are NaN: a splitter does not see them.
        """
        return self._report

    def forward(self, features: Any) -> dict[str, Any]:
        """Return a view of the features for each task; in evaluation or without gradients the features themselves.

        Args:
            features: A tensor, or tuples, lists and dicts of tensors, which are balanced together. Tensors that require no
                gradient are returned as they are. Samples are along the first dimension.

        Returns:
            By task, a structure like ``features``. Views share their memory and must not be changed in place.

        Raises:
            TypeError: If something in it is not a tensor of floats.
            ValueError: If there is no tensor, or samples must be distinguished and the tensors have different numbers of them.
        """
        tensors = _tensors(features)
        if not tensors:
            raise ValueError("features must hold at least one tensor, but got none.")
        live = list({id(z): z for z in tensors if z.requires_grad}.values())
        if not (live and self.training and torch.is_grad_enabled()):
            return dict.fromkeys(self.tasks, features)
        lengths = {_num_samples(z) for z in live}
        if len(lengths) > 1 and (self.normalizes or self.variant):
            raise ValueError(
                f"Features must have samples along the first dimension, but it has sizes {sorted(lengths)}. Use one "
                "Splitter for each tensor, or a gradient balancer, which needs no samples."
            )
        views = _Split.apply(self, *live)  # type: ignore[no-untyped-call]
        by_task = [dict(zip(map(id, live), views[k :: len(self.tasks)], strict=True)) for k in range(len(self.tasks))]
        return {task: _replaced(features, view) for task, view in zip(self.tasks, by_task, strict=True)}

    def get_extra_state(self) -> Tensor:
        """Return the task names, so that a checkpoint is not loaded into a splitter for other tasks. Shape (n,), uint8."""
        return encode_tasks(self.tasks)

    def set_extra_state(self, state: Any) -> None:
        """Check the tasks of a checkpoint.

        Raises:
            ValueError: If they differ from this splitter's.
        """
        check_tasks(state, self.tasks, "Splitter")

    def __repr__(self) -> str:
        parts = [repr(self.tasks), f"gradient={self._gradient}"]
        if (self.weights != 1).any():
            parts.append(f"weights={dict(zip(self.tasks, self.weights.tolist(), strict=True))}")
        if self.variant:
            parts.append(f"variant={self.variant}")
        if self.beta != _BETA:
            parts.append(f"beta={self.beta}")
        return f"Splitter({', '.join(parts)})"

    def _build(self, gradient: str | GradientRule, options: Mapping[str, Any] | None, seed: int) -> None:
        if self.variant:
            raise ValueError(
                f"variant={self.variant} is for gradient='normalized' or None, but got {gradient!r}. Leave it out."
            )
        if isinstance(gradient, str):
            if gradient not in gradient_balancers:
                raise ValueError(unknown("gradient balancer", gradient, (*gradient_balancers.names(), "normalized")))
            self.sees = gradient_balancers.sees(gradient)
        self.rule = build_rule(gradient_balancers, gradient, options, num_tasks=len(self.tasks), seed=2 * seed + 1)
        if isinstance(self.rule, nn.Module) or self.sees == "jacobian":
            return
        if takes(self.rule, "losses"):
            try:
                self.rule(torch.eye(len(self.tasks), dtype=torch.float64, device="cpu"))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"A Splitter sees no losses, but {gradient!r} fails without: {error} Use a Balancer."
                ) from None
        elif isinstance(gradient, str) and options:
            try_out(self.rule, len(self.tasks))

    def _merge(self, gradients: FeatureGradients, memory: _Memory) -> list[Tensor]:
        """Balance the gradients of one backward pass; the gradient that each feature tensor gets, flat."""
        factor = self.scaler.get_scale() if self.scaler is not None and self.scaler.is_enabled() else 1.0
        if self.rule is not None:
            return self._by_rule(gradients, memory, factor)
        if self.variant:
            return self._by_sample(gradients, memory, factor)
        sums = sum_over_ranks(gradients.squares(), None, gradients, len(self.tasks))
        scales = self._scales(sums, factor, memory)
        return gradients.combined(scales[gradients.indices])

    def _by_sample(self, gradients: FeatureGradients, memory: _Memory, factor: float) -> list[Tensor]:
        """Apply the projections of a variant."""
        pieces = gradients.samples()  # (B, k, f) each
        wide = [piece.double() for piece in pieces]
        C = torch.stack([(piece @ piece.transpose(1, 2)).to(gradients.indices.device) for piece in wide]).sum(
            dim=0
        )  # (B, k, k)
        before = None if self.variant == 2 or memory.orders else self.random.get_extra_state()
        A, squares = None, C.diagonal(dim1=1, dim2=2).sum(dim=0)
        if self.variant == 3:
            A = project_samples(C, self._orders(gradients.tasks, memory))  # (B, k, k)
            squares = ((A @ C) * A).sum(dim=(0, 2))  # of the projected gradients
        sums = sum_over_ranks(squares, C.sum(dim=0), gradients, len(self.tasks))
        scales = self._scales(sums, factor, memory)[gradients.indices]
        if not sums.finite:
            if before is not None:  # as if nothing had been drawn
                self.random.set_extra_state(before)
                memory.orders = None
            return gradients.combined(scales * math.nan)
        if A is not None:
            coefficients = scales @ A  # (B, k)
        else:
            C = scales[:, None] * C * scales
            merge = shortest_between if self.variant == 2 else self._projected(gradients.tasks, memory)
            coefficients = merge(C) * scales
        return [(coefficients.to(piece)[:, None] @ piece).flatten() for piece in pieces]

    def _projected(self, tasks: list[int], memory: _Memory) -> Callable[[Tensor], Tensor]:
        return lambda C: project_samples(C, self._orders(tasks, memory)).sum(dim=1)

    def _scales(self, sums: Sums, factor: float, memory: _Memory) -> Tensor:
        """Return the weight of each task over its length; NaN where a gradient is not finite. Shape (K,)."""
        weights = (self.weights / self.weights.sum()).to(sums.squares)
        stretch = torch.where(sums.finite, torch.ones_like(weights), math.nan)
        if self.normalizes:
            stretch = self._normalize(sums.squares / (factor**2 * max(sums.batch, 1.0)), sums.finite, memory)
        G = None if sums.gramian is None else weights[:, None] * sums.gramian * weights / factor**2
        self._record(sums.tasks, weights, None if self.variant else stretch, G)
        return weights * stretch

    def _normalize(self, means: Tensor, finite: Tensor, memory: _Memory) -> Tensor:
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

    def _by_rule(self, gradients: FeatureGradients, memory: _Memory, factor: float) -> list[Tensor]:
        """Apply the gradient balancer to the tasks that are present on any rank."""
        G = gradients.gramian()  # (k, k)
        sums = sum_over_ranks(G.diagonal(), G, gradients, len(self.tasks))
        present = sums.tasks
        if not present or sums.gramian is None:
            return gradients.combined(G.diagonal())
        E = self.weights.to(G)
        G = (E[:, None] * sums.gramian * E / factor**2).cpu()  # (K, K), the one copy to the host
        finite = bool(G.isfinite().all())
        if finite and self.sees == "jacobian":
            J = gradients.jacobian()  # (k, F)
            direction = self._direction(E[gradients.indices, None].to(J) * (J / factor), present, memory)
            self._record(present, E, None, G)
            return list(torch.split(factor * direction.to(J), [len(first) for first, *_ in gradients.flat]))
        weights = G.new_full((len(G),), 0.0 if finite else math.nan)  # (K,)
        if finite:
            weights[present] = self._solved(G[present][:, present], present, memory).to(weights)
        self._record(present, E, weights, G)
        return gradients.combined(E[gradients.indices] * weights[gradients.tasks].to(E))

    def _solved(self, G: Gramian, present: list[int], memory: _Memory) -> Weights:
        """Return the weights of a rule that sees the Gramian of the present tasks. Shape (k, k) -> (k,)."""
        step = self._step(present)
        with self._repeating(memory):
            weights = self.rule.reuse(step.present) if hasattr(self.rule, "reuse") else None
            if weights is None:
                weights = apply_rule(self.rule, step, G)
            return checked_weights(weights, len(present))

    def _direction(self, J: Jacobian, present: list[int], memory: _Memory) -> Direction:
        """Return the direction of a rule that sees the Jacobian. Shape (k, F) -> (F,)."""
        if num_ranks() > 1:
            raise RuntimeError(
                "A gradient balancer that sees the Jacobian balances the gradients of one process, but torch.distributed "
                f"runs {num_ranks()}. Use a gradient balancer that sees the Gramian."
            )
        with self._repeating(memory):
            direction = apply_rule(self.rule, self._step(present), J)
            if not isinstance(direction, Tensor) or direction.shape != J.shape[1:] or not direction.isfinite().all():
                raise ValueError(f"The gradient balancer must return a finite direction ({J.shape[1]},), but got {direction}.")
        return direction.detach()

    def _step(self, present: list[int]) -> _Present:
        index = None if len(present) == len(self.tasks) else torch.tensor(present, device="cpu")
        return _Present(tuple(self.tasks[k] for k in present), index)

    @contextmanager
    def _repeating(self, memory: _Memory) -> Iterator[None]:
        """Start the rule from its state before the first pass over this graph; only that pass changes the state, if at all."""
        state = copy.deepcopy(self.rule.state_dict()) if isinstance(self.rule, nn.Module) else {}
        if memory.rule is None:
            with restored_on_error(self.rule):
                yield
            memory.rule = state
            return
        if state:
            self.rule.load_state_dict(memory.rule)
        try:
            yield
        finally:
            if state:
                self.rule.load_state_dict(state)

    def _orders(self, tasks: list[int], memory: _Memory) -> Tensor:
        """Return in row i the other tasks in the order in which task i meets them, indices into ``tasks``. Shape (k, k - 1)."""
        if memory.orders is None:
            memory.orders = self.random.permutations(len(self.tasks), len(self.tasks)).tolist()
        place = {task: i for i, task in enumerate(tasks)}
        orders = [[place[j] for j in memory.orders[i] if j in place and j != i] for i in tasks]
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


@dataclass
class _Memory:
    """Results of the first backward pass over a graph, which later passes repeat."""

    rule: dict[str, Any] | None = None  # the rule's state before that pass
    orders: list[list[int]] | None = None
    averages: tuple[Tensor, Tensor] | None = None  # (K,) twice: tasks that have been counted, averages they were divided by


class _Present(NamedTuple):
    """The tasks of one backward pass; see `balance.rules.build.PresentTasks`."""

    tasks: tuple[str, ...]
    present: Tensor | None


class _Split(torch.autograd.Function):
    """K views of each feature tensor, whose gradients are balanced into one."""

    @staticmethod
    def forward(ctx: Any, splitter: Splitter, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # an absent task differs from a task whose gradient is zero
        ctx.splitter, ctx.memory = splitter, _Memory()
        ctx.like = [(z.shape, z.dtype, z.device) for z in features]
        ctx.batch = _num_samples(features[0])
        return tuple(z.view_as(z) for z in features for _ in splitter.tasks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        K = len(ctx.splitter.tasks)
        by_tensor = [gradients[i * K : (i + 1) * K] for i in range(len(ctx.like))]
        tasks = [k for k in range(K) if any(rows[k] is not None for rows in by_tensor)]
        if not tasks and num_ranks() == 1:
            return (None,) * (1 + len(by_tensor))
        device = ctx.like[0][2]
        flat = [[flat_gradient(rows[k], *like) for k in tasks] for rows, like in zip(by_tensor, ctx.like, strict=True)]
        with torch.autocast(device.type, enabled=False):
            index = torch.tensor(tasks, dtype=torch.int64, device=device)
            pieces = ctx.splitter._merge(FeatureGradients(flat, tasks, index, ctx.batch), ctx.memory)
        merged: list[Tensor | None] = [None]
        for rows, piece, (shape, dtype, where) in zip(by_tensor, pieces, ctx.like, strict=True):
            reached = any(row is not None for row in rows)
            merged.append(piece.reshape(shape).to(where, dtype) if reached else None)
        return tuple(merged)


def _check_options(variant: object, beta: float, scaler: object, num_tasks: int) -> None:
    check_type("variant", variant, Variant)
    check_type("beta", beta, float)
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in 0..1, 1 excluded, but got {beta}.")
    if scaler is not None and not hasattr(scaler, "get_scale"):
        raise TypeError(f"scaler must be a GradScaler, but got {type(scaler).__name__}. Use torch.amp.GradScaler.")
    if variant == 2 and num_tasks != 2:
        raise ValueError(f"variant=2 is for two tasks, but got {num_tasks}. Use gradient='mgda' for more.")


def _num_samples(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 1


def _tensors(features: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists and dicts."""
    if isinstance(features, Tensor):
        if not features.is_floating_point():
            raise TypeError(f"features must be floats, but got {features.dtype}. Hand such a tensor to the heads directly.")
        return [features]
    if not isinstance(features, Mapping | list | tuple):
        raise TypeError(
            f"features must be a tensor, or tuples, lists or dicts of tensors, but got {type(features).__name__}. "
            "Hand anything else to the heads directly."
        )
    parts = features.values() if isinstance(features, Mapping) else features
    return [tensor for part in parts for tensor in _tensors(part)]


def _replaced(features: Any, views: Mapping[int, Tensor]) -> Any:
    """Return the same structure with views, given by the ids of the tensors that they replace."""
    if isinstance(features, Tensor):
        return views.get(id(features), features)
    if isinstance(features, Mapping):
        return {name: _replaced(part, views) for name, part in features.items()}
    parts = [_replaced(part, views) for part in features]
    return type(features)(*parts) if hasattr(features, "_fields") else type(features)(parts)


def _read_weights(weights: Mapping[str, float] | Sequence[float] | None, tasks: tuple[str, ...]) -> Tensor:
    if weights is None:
        return torch.ones(len(tasks), dtype=torch.float64, device="cpu")
    if isinstance(weights, Mapping):
        for task in weights:
            if task not in tasks:
                raise ValueError(unknown("task in weights", task, tasks))
        if missing := [task for task in tasks if task not in weights]:
            raise ValueError(f"weights must have a number for every task, but has none for {', '.join(missing)}.")
        weights = [weights[task] for task in tasks]
    values = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if values.shape != (len(tasks),):
        raise ValueError(f"weights must have a number for each of {len(tasks)} tasks, but got {weights!r}.")
    if not (values.isfinite() & (values >= 0)).all() or not values.sum() > 0:
        raise ValueError(f"weights must be finite, not negative, and not all zero, but got {values.tolist()}.")
    return values.clone()
