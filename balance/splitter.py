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

from balance.inputs import Step, task_names
from balance.jacobian import InnerProducts
from balance.random import SeededGenerator
from balance.registry import check_type, gradient_balancers, takes, unknown
from balance.report import Report
from balance.rules import apply_rule, build_rule, try_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.amp.grad_scaler import GradScaler

    from balance.shapes import GradientRule, Gramian, Jacobian, Sees, Weights

Variant = Literal[0, 1, 2, 3]

_SHORTEST = 1e-30  # root mean square length that a gradient is divided by at least: its inverse is a float32


class Splitter(nn.Module):
    r"""A view of the features for every task; where the tasks' gradients meet again, in the backward pass, they are balanced.

    The forward pass is the identity, K times. In the backward pass the gradient :math:`g_k` of the features arrives from
    every task k, and what goes on into the trunk is

    .. math:: d = \sum_k \frac{w_k}{\sum_j w_j} \frac{g_k}{\sqrt{v_k}}, \qquad v_k = \frac{m_k}{1 - \beta^{t_k}}, \qquad
              m_k \leftarrow \beta m_k + (1 - \beta) q_k

    where :math:`q_k` is the squared length of a sample's gradient, averaged over the batch, and :math:`t_k` counts the updates
    of :math:`m_k`. So a constant positive factor on a task's loss changes nothing but the gradients of its own head:
    give the weights to the splitter, not to the losses. Lengths are of order 1 for every sample, whatever the size of the
    batch, so the trunk's learning rate gets another meaning, unless the optimizer ignores the scale, as Adam does.

    Or, with a gradient balancer, :math:`d = \sum_k w_k g_k` with its weights for the Gramian of the :math:`g_k`, in which
    every sample counts on its own: the step of ``Balancer(source="features", heads="unweighted")``, in one backward pass.

    Because nothing but autograd is used, it works anywhere in a network, several times in one, one below the other, with
    any optimizer and under autocast. Gradients of half precision are merged in float32, Gramians are of float64. The
    gradients of all tasks are held until the last has arrived. Heads get their ordinary gradients.

    State moves once for each forward pass, in the first backward pass that brings a task's gradient; so with gradient
    accumulation it moves once for each ``backward()``. A second backward pass over the same graph moves nothing and
    gives the same gradients again. Gradients taken one task at a time (``torch.autograd.grad`` of each loss) are each balanced
    alone: with the normalisation and without projections they add up to those of one pass, and the state moves once.
    A task whose view no loss reaches is absent: a gradient balancer sees the smaller problem, the normalisation keeps
    dividing by the weights of all tasks, and the task's state stays as it is. So does a moving average where the gradient
    is exactly zero. Where any gradient is infinite or NaN nothing moves and NaN is passed on, as a GradScaler needs it.

    Under ``torch.distributed`` squared lengths and Gramians are summed over all ranks, in every backward pass, which
    is exact since different samples are different coordinates: all ranks use the same weights, those of one process with the
    whole batch. The losses must be means over the local batch, the gradients of the ranks be averaged, as
    DistributedDataParallel does, and the backward pass of every rank must come by.

    Args:
        tasks: Names of the tasks, or their number K (the names are then "0", "1", ...).
        gradient: ``"normalized"``, the formula above; None: the same without :math:`\sqrt{v_k}`, a weighted mean;
            a registered gradient balancer; or any callable from a Gramian (K, K) to weights (K,).
        gradient_options: Options of a registered gradient balancer.
        weights: Weight of each task, not negative, by name or in order; ones by default. A gradient balancer sees the
            gradients times these, as it would those of weighted losses.
        variant: Without a gradient balancer, sample by sample: 0: nothing more; 1: every task's gradient is projected off
            those that it conflicts with, in random order, after the normalisation; 3: before it, so that the lengths are those
            of the projected gradients; 2: two tasks only: the shortest vector between the two normalised gradients.
        beta: Memory of the moving averages, in 0..1, 1 excluded.
        seed: Seed of rules and variants that draw; a Balancer with the same seed draws the same.
        scaler: The GradScaler of mixed-precision training. Needed with it: a rule sees unscaled gradients and those that go
            on are scaled, where otherwise the normalisation would undo the scale and the scaler would divide by it once more.

    Raises:
        ValueError: If a name, an option or a choice is unknown, out of range, or without effect.
        TypeError: If something has the wrong type.

    Source:
        ``NormalizedMultiTaskSplitter`` of guillaumeBellec/multitask (package torchmultitask), after the balancer of
        Défossez et al., "High Fidelity Neural Audio Compression", 2022. Differs: the averages are replaced, never changed
        in place, so that a graph can be walked twice; they are float64, with no epsilon but 1e-30; samples are flattened
        for variant 2; features may be of one dimension, K may be 1; random orders come from a generator of its own; gradients
        that are not finite leave no trace; exact over ranks; gradient balancers.
    """

    squares: Tensor
    counts: Tensor
    weights: Tensor

    def __init__(
        self,
        tasks: Sequence[str] | int,
        gradient: str | GradientRule | None = "normalized",
        gradient_options: Mapping[str, Any] | None = None,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        variant: Variant = 0,
        beta: float = 0.999,
        seed: int = 0,
        scaler: GradScaler | None = None,
    ) -> None:
        super().__init__()
        check_type("variant", variant, Variant)
        check_type("beta", beta, float)
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in 0..1, 1 excluded, but got {beta}.")
        if scaler is not None and not hasattr(scaler, "get_scale"):
            raise TypeError(f"scaler must be a GradScaler, but got {type(scaler).__name__}. Use torch.amp.GradScaler.")
        self.tasks = task_names(tasks)
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
        if variant == 2 and len(self.tasks) != 2:
            raise ValueError(f"variant=2 is for two tasks, but got {len(self.tasks)}. Use gradient='mgda' for more.")
        if variant in (1, 3):
            self.random = SeededGenerator(2 * seed + 1)
        # Moving averages of the squared lengths, and how often they were updated
        self.register_buffer("squares", torch.zeros(len(self.tasks), dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(len(self.tasks), dtype=torch.int64))
        self.register_buffer("weights", _read_weights(weights, self.tasks), persistent=False)
        self._report: Report | None = None

    @property
    def report(self) -> Report | None:
        """What the last backward pass did; None before the first.

        The direction is the sum of the gradients times ``loss_weights`` (those of the tasks) times ``gradient_weights``,
        which is None where there are none for the batch as a whole. ``gramian`` is of the gradients times ``loss_weights``. The
        losses are NaN: a splitter does not see them.
        """
        return self._report

    def forward(self, features: Any) -> dict[str, Any]:
        """Views of the features, one for each task; in evaluation or without gradients the features themselves.

        Args:
            features: A tensor, or tuples, lists and dicts of tensors, which are balanced as one. Those that require no
                gradient are handed through. Samples are along the first dimension.

        Returns:
            By task, what ``features`` is. Views share their memory and must not be changed in place.

        Raises:
            TypeError: If something in it is not a tensor of floats.
            ValueError: If there is no tensor, or samples must be told apart and the tensors have different numbers of them.
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
        of_task = [dict(zip(map(id, live), views[k :: len(self.tasks)], strict=True)) for k in range(len(self.tasks))]
        return {task: _replaced(features, own) for task, own in zip(self.tasks, of_task, strict=True)}

    def get_extra_state(self) -> dict[str, Any]:
        """The tasks, so that a checkpoint is not loaded into a splitter for others."""
        return {"tasks": self.tasks}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Check the tasks of a checkpoint.

        Raises:
            ValueError: If they differ from this splitter's.
        """
        if tuple(state["tasks"]) != self.tasks:
            raise ValueError(f"The checkpoint is of tasks {tuple(state['tasks'])}, but this Splitter is for {self.tasks}.")

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
                self.rule(torch.eye(len(self.tasks), dtype=torch.float64))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"A Splitter sees no losses, but {gradient!r} fails without: {error} Use a Balancer."
                ) from None
        elif isinstance(gradient, str) and options:
            try_out(self.rule, len(self.tasks))

    def _merge(self, rows: _Rows, memory: _Memory) -> list[Tensor]:
        """What goes on to each feature tensor, flat, for the gradients of one backward pass."""
        factor = self.scaler.get_scale() if self.scaler is not None and self.scaler.is_enabled() else 1.0
        if self.rule is not None:
            return self._by_rule(rows, memory, factor)
        if self.variant:
            return self._by_sample(rows, memory, factor)
        sums = _over_ranks(rows.squares(), None, rows, len(self.tasks))
        scales = self._scales(sums, factor, memory)
        return rows.combined(scales[rows.at])

    def _by_sample(self, rows: _Rows, memory: _Memory, factor: float) -> list[Tensor]:
        """The projections of a variant."""
        pieces = rows.samples()  # (B, k, f) each
        wide = [piece.double() for piece in pieces]
        C = torch.stack([(piece @ piece.transpose(1, 2)).to(rows.at.device) for piece in wide]).sum(dim=0)  # (B, k, k)
        before = None if self.variant == 2 or memory.orders else self.random.get_extra_state()
        A, squares = None, C.diagonal(dim1=1, dim2=2).sum(dim=0)
        if self.variant == 3:
            A = project_samples(C, self._orders(rows.tasks, memory))  # (B, k, k)
            squares = ((A @ C) * A).sum(dim=(0, 2))  # of the projected gradients
        sums = _over_ranks(squares, C.sum(dim=0), rows, len(self.tasks))
        scales = self._scales(sums, factor, memory)[rows.at]
        if not sums.finite:
            if before is not None:  # as if nothing had been drawn
                self.random.set_extra_state(before)
                memory.orders = None
            return rows.combined(scales * math.nan)
        if A is not None:
            coefficients = scales @ A  # (B, k)
        else:
            C = scales[:, None] * C * scales
            combined = shortest_between(C) if self.variant == 2 else project_samples(C, self._orders(rows.tasks, memory)).sum(1)
            coefficients = combined * scales
        return [(coefficients.to(piece)[:, None] @ piece).flatten() for piece in pieces]

    def _scales(self, sums: _Sums, factor: float, memory: _Memory) -> Tensor:
        """Weight of each task over its length; NaN where a gradient is not finite. Shape (K,)."""
        weights = (self.weights / self.weights.sum()).to(sums.squares)
        stretch = torch.where(sums.finite, torch.ones_like(weights), math.nan)
        if self.normalizes:
            stretch = self._normalize(sums.squares / (factor**2 * max(sums.batch, 1.0)), sums.finite, memory)
        G = None if sums.gramian is None else weights[:, None] * sums.gramian * weights / factor**2
        self._record(sums.tasks, weights, None if self.variant else stretch, G)
        return weights * stretch

    def _normalize(self, means: Tensor, finite: Tensor, memory: _Memory) -> Tensor:
        """Update the moving averages, once for each graph and task; the inverse lengths that they give. Shape (K,)."""
        squares, counts = self.squares.to(means), self.counts.to(means.device)
        counted, divisors = memory.averages or (torch.zeros_like(counts, dtype=torch.bool), torch.zeros_like(squares))
        new = finite & (means > 0) & ~counted
        self.squares = torch.where(new, self.beta * squares + (1 - self.beta) * means, squares)
        self.counts = counts + new
        averages = torch.where(counted, divisors, self.squares / (1 - self.beta ** self.counts.clamp(min=1).to(means)))
        memory.averages = (counted | new, averages)
        stretch = torch.where(averages > 0, 1 / averages.sqrt().clamp(min=_SHORTEST), 0.0)
        return torch.where(finite, stretch, math.nan)

    def _by_rule(self, rows: _Rows, memory: _Memory, factor: float) -> list[Tensor]:
        """What the gradient balancer makes of the tasks that are present on any rank."""
        own = rows.gramian()  # (k, k)
        sums = _over_ranks(own.diagonal(), own, rows, len(self.tasks))
        there = sums.tasks
        if not there or sums.gramian is None:
            return rows.combined(own.diagonal())
        E = self.weights.to(own)
        G = (E[:, None] * sums.gramian * E / factor**2).cpu()  # the one copy to the host
        weights = G.new_zeros(len(G))  # (K,)
        present = None if len(there) == len(self.tasks) else torch.tensor(there, device="cpu")
        step = Step(tuple(self.tasks[k] for k in there), present, [], E[:0], E[:0])
        if not G.isfinite().all():
            weights.fill_(math.nan)
        elif self.sees == "jacobian":
            if _num_ranks() > 1:
                raise RuntimeError(
                    "A gradient balancer that sees the Jacobian balances the gradients of one process, but torch.distributed "
                    f"runs {_num_ranks()}. Use one that sees the Gramian."
                )
            J = rows.jacobian()  # (k, F)
            with self._repeating(memory):
                direction = apply_rule(self.rule, step, E[rows.at, None].to(J) * (J / factor))
            if not isinstance(direction, Tensor) or direction.shape != J.shape[1:] or not direction.isfinite().all():
                raise ValueError(f"The gradient balancer must return a finite direction ({J.shape[1]},), but got {direction}.")
            self._record(there, E, None, G)
            return list(torch.split(factor * direction.detach().to(J), [len(first) for first, *_ in rows.flat]))
        else:
            with self._repeating(memory):
                found = self.rule.reuse(present) if hasattr(self.rule, "reuse") else None
                if found is None:
                    found = apply_rule(self.rule, step, G[there][:, there])
            if not isinstance(found, Tensor) or found.shape != (len(there),) or not found.isfinite().all():
                raise ValueError(f"The gradient balancer must return {len(there)} finite weights, but got {found}.")
            weights[there] = found.detach().to(weights)
        self._record(there, E, weights, G)
        return rows.combined(E[rows.at] * weights[rows.tasks].to(E))

    @contextmanager
    def _repeating(self, memory: _Memory) -> Iterator[None]:
        """Let the rule begin where it began in the first pass over this graph; that pass alone moves its state."""
        now = copy.deepcopy(self.rule.state_dict()) if isinstance(self.rule, nn.Module) else {}
        if memory.rule is None:
            memory.rule = now
            yield
            return
        if now:
            self.rule.load_state_dict(memory.rule)
        try:
            yield
        finally:
            if now:
                self.rule.load_state_dict(now)

    def _orders(self, tasks: list[int], memory: _Memory) -> Tensor:
        """Row i: the other tasks in the order in which task i meets them, as indices into ``tasks``. Shape (k, k - 1)."""
        if memory.orders is None:
            memory.orders = self.random.permutations(len(self.tasks), len(self.tasks)).tolist()
        place = {task: i for i, task in enumerate(tasks)}
        orders = [[place[j] for j in memory.orders[i] if j in place and j != i] for i in tasks]
        return torch.tensor(orders, dtype=torch.int64, device="cpu")

    def _record(self, there: list[int], weights: Tensor, stretch: Weights | None, gramian: Gramian | None) -> None:
        if len(there) < len(self.tasks):
            weights = weights[there]
            gramian = None if gramian is None else gramian[there][:, there]
            stretch = None if stretch is None else stretch[there]
        unseen = torch.full_like(weights, math.nan)
        self._report = Report(tuple(self.tasks[k] for k in there), unseen, unseen, weights.clone(), stretch, gramian)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Splitter:  # noqa: FBT001, FBT002
        """Move or cast, as ``.to()`` and ``.half()`` ask; float64 state moves but is never cast."""

        def keep_precision(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return tensor.to(changed.device) if tensor.dtype == torch.float64 else changed

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self


def project_samples(gramians: Tensor, orders: Tensor) -> Tensor:
    """Every task's gradient, projected off those that it conflicts with, sample by sample, as combinations of the gradients.

    Args:
        gramians: Shape (B, k, k).
        orders: Row i lists the other tasks in the order in which task i meets them. Shape (k, k - 1).

    Returns:
        Entry (b, i, j): coefficient of gradient j in what is left of gradient i. Shape (B, k, k).
    """
    everyone = torch.arange(gramians.shape[1], device=gramians.device)
    coefficients, products = _identity(gramians), gramians.clone()
    squares = gramians.diagonal(dim1=1, dim2=2)
    for met in orders.to(gramians.device).unbind(dim=1):
        product = products[:, everyone, met]  # (B, k)
        conflict = (product < 0) & (squares[:, met] > 0)
        step = torch.where(conflict, product / torch.where(conflict, squares[:, met], 1.0), 0.0)
        coefficients[:, everyone, met] -= step
        products -= step[:, :, None] * gramians[:, met]
    return coefficients


def shortest_between(gramians: Tensor) -> Tensor:
    """Weights of the shortest vector between two gradients, sample by sample; one alone is left. Shape (B, k, k) -> (B, k)."""
    if gramians.shape[1] < 2:
        return torch.ones_like(gramians[:, 0])
    a, b, ab = gramians[:, 0, 0], gramians[:, 1, 1], gramians[:, 0, 1]
    distance = a + b - 2 * ab
    first = torch.where(distance != 0, (b - ab) / distance, 0.0).clamp(0, 1)
    return torch.stack([first, 1 - first], dim=1)


@dataclass
class _Memory:
    """What later backward passes over the same graph repeat of the first."""

    rule: dict[str, Any] | None = None  # the rule's state before that pass
    orders: list[list[int]] | None = None
    averages: tuple[Tensor, Tensor] | None = None  # (K,) twice: tasks that have been counted, averages they were divided by


class _Rows(NamedTuple):
    """Gradients of the features, of the k tasks that reach them."""

    flat: list[list[Tensor]]  # [tensor][task], each flat; zero where the task does not reach the tensor
    tasks: list[int]  # which tasks they are
    at: Tensor  # the same, where the gradients are
    batch: int  # number of samples

    def squares(self) -> Tensor:
        """Squared lengths, float64. Shape (k,)."""
        total = torch.zeros(len(self.tasks), dtype=torch.float64, device=self.at.device)
        for own in self.flat:
            norms = [torch.linalg.vector_norm(row, dtype=torch.float64) for row in own]
            total += torch.stack(norms).square().to(total) if norms else total
        return total

    def gramian(self) -> Gramian:
        """Inner products, float64. Shape (k, k)."""
        if not self.tasks:
            return torch.zeros(0, 0, dtype=torch.float64, device=self.at.device)
        products = InnerProducts(len(self.tasks), sum(len(first) for first, *_ in self.flat), self.at.device)
        for own in self.flat:
            products.add(own)
        return products.total()

    def combined(self, weights: Tensor) -> list[Tensor]:
        """Weighted sums of the tasks' gradients, one of each tensor, at least float32. ``weights``: (k,)."""
        found = []
        for own in self.flat:
            dtype = torch.promote_types(own[0].dtype, torch.float32) if own else torch.float32
            factors = weights.to(own[0].device if own else weights.device, dtype).unbind()
            total = own[0].to(dtype) * factors[0] if own else weights
            for row, factor in zip(own[1:], factors[1:], strict=True):
                total.addcmul_(row.to(dtype), factor)
            found.append(total)
        return found

    def samples(self) -> list[Tensor]:
        """Gradients of every sample, of each tensor, at least float32. Shape (B, k, f) each."""
        found = []
        for own in self.flat:
            J = torch.stack(own)
            J = J.to(torch.promote_types(J.dtype, torch.float32))
            found.append(J.view(len(own), self.batch, J.shape[1] // max(self.batch, 1)).transpose(0, 1))
        return found

    def jacobian(self) -> Jacobian:
        """The gradients as rows, in the widest dtype, at least float32, where the first tensor is. Shape (k, F)."""
        dtype = torch.float32
        for own in self.flat:
            dtype = torch.promote_types(dtype, own[0].dtype)
        return torch.cat([torch.stack(own).to(self.at.device, dtype) for own in self.flat], dim=1)


class _Sums(NamedTuple):
    """Numbers of all ranks together; zero where a task is absent."""

    squares: Tensor  # (K,)
    gramian: Gramian | None  # (K, K)
    finite: Tensor  # whether they all are
    tasks: list[int]
    batch: float


class _Split(torch.autograd.Function):
    """Features -> K views of each; the tasks' gradients -> one."""

    @staticmethod
    def forward(ctx: Any, splitter: Splitter, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a task that is absent is not a task whose gradient is zero
        ctx.splitter, ctx.memory = splitter, _Memory()
        ctx.like = [(z.shape, z.dtype, z.device) for z in features]
        ctx.batch = _num_samples(features[0])
        return tuple(z.view_as(z) for z in features for _ in splitter.tasks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        K = len(ctx.splitter.tasks)
        of_tensor = [gradients[i * K : (i + 1) * K] for i in range(len(ctx.like))]
        tasks = [k for k in range(K) if any(own[k] is not None for own in of_tensor)]
        if not tasks and _num_ranks() == 1:
            return (None,) * (1 + len(of_tensor))
        device = ctx.like[0][2]
        flat = [[_flat(own[k], *like) for k in tasks] for own, like in zip(of_tensor, ctx.like, strict=True)]
        with torch.autocast(device.type, enabled=False):
            rows = _Rows(flat, tasks, torch.tensor(tasks, dtype=torch.int64, device=device), ctx.batch)
            pieces = ctx.splitter._merge(rows, ctx.memory)
        merged: list[Tensor | None] = [None]
        for own, piece, (shape, dtype, where) in zip(of_tensor, pieces, ctx.like, strict=True):
            reached = any(gradient is not None for gradient in own)
            merged.append(piece.reshape(shape).to(where, dtype) if reached else None)
        return tuple(merged)


def _flat(gradient: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    if gradient is None:
        return torch.zeros((), dtype=dtype, device=device).expand(shape.numel())
    return (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)


def _over_ranks(squares: Tensor, gramian: Gramian | None, rows: _Rows, num_tasks: int) -> _Sums:
    """Sums over the ranks, of the gradients of the mean of the ranks' losses: 1 / ranks of what arrives on each."""
    q, G = squares, gramian
    if len(rows.tasks) < num_tasks:
        q = squares.new_zeros(num_tasks)
        q[rows.at] = squares
        if gramian is not None:
            G = gramian.new_zeros(num_tasks, num_tasks)
            G[rows.at[:, None], rows.at] = gramian
    tasks, batch, ranks = rows.tasks, float(rows.batch), _num_ranks()
    if ranks > 1:
        present = q.new_zeros(num_tasks)
        present[rows.at] = 1
        parts = [present, q.new_tensor([batch]), q / ranks**2, *([] if G is None else [G.flatten() / ranks**2])]
        sums = torch.cat(parts)
        torch.distributed.all_reduce(sums)
        *counts, batch = sums[: num_tasks + 1].tolist()
        tasks = [k for k, count in enumerate(counts) if count]
        q = sums[num_tasks + 1 : 2 * num_tasks + 1]
        G = None if G is None else sums[2 * num_tasks + 1 :].view(num_tasks, num_tasks)
    return _Sums(q, G, (q if G is None else G).isfinite().all() & q.isfinite().all(), tasks, batch)


def _num_ranks() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def _num_samples(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 1


def _identity(gramians: Tensor) -> Tensor:
    return torch.eye(gramians.shape[1], dtype=gramians.dtype, device=gramians.device).repeat(len(gramians), 1, 1)


def _tensors(features: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dicts."""
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
    """The same structure with views, by the id of the tensors that they replace."""
    if isinstance(features, Tensor):
        return views.get(id(features), features)
    if isinstance(features, Mapping):
        return {name: _replaced(part, views) for name, part in features.items()}
    parts = [_replaced(part, views) for part in features]
    return type(features)(*parts) if hasattr(features, "_fields") else type(features)(parts)


def _read_weights(weights: Mapping[str, float] | Sequence[float] | None, tasks: tuple[str, ...]) -> Tensor:
    if weights is None:
        return torch.ones(len(tasks), dtype=torch.float64)
    if isinstance(weights, Mapping):
        for task in weights:
            if task not in tasks:
                raise ValueError(unknown("task in weights", task, tasks))
        if missing := [task for task in tasks if task not in weights]:
            raise ValueError(f"weights must have a number for every task, but has none for {', '.join(missing)}.")
        weights = [weights[task] for task in tasks]
    found = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if found.shape != (len(tasks),):
        raise ValueError(f"weights must have a number for each of {len(tasks)} tasks, but got {weights!r}.")
    if not (found.isfinite() & (found >= 0)).all() or not found.sum() > 0:
        raise ValueError(f"weights must be finite, not negative, and not all zero, but got {found.tolist()}.")
    return found.clone()
