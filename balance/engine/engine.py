"""Compute the per-task gradients of one step: which backward passes run, and what is kept in memory."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from balance.engine.accumulate import paired, without_hooks
from balance.engine.custom_functions import Functions, explained
from balance.engine.gramian import HeadGradients, InnerProducts, Rows, SparseRows, flat, pieces, sparse_rows, unflat
from balance.engine.graph import Layer, Reach, Root, activations, depths, layers, unpacks
from balance.engine.passes import AtFeatures, AtLosses, Start, all_at_once, one_by_one, weighted_sum
from balance.messages import warn_caller

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from balance.engine.accumulate import LeafGradient
    from balance.engine.partition import Parts
    from balance.types import Direction, EngineChoice, Gramian, Jacobian, Memory

Form = Literal["rows", "matrix", "gramian"]

_SHARE = 0.4  # of the Jacobian: what is kept of it at most with memory="gramian", unless one parameter alone is larger
_SMALL = 0.1  # of the shared parameters: features that are fewer may be kept for every task
# Cost of moving a number, of a multiplication in double precision, and of one in a QR decomposition, relative to one
# multiplication in a product of matrices; measured on a CPU, rounded
_MOVED, _DOUBLE, _DECOMPOSED = 20, 4, 2.5


class Estimate(NamedTuple):
    """Memory for the gradients that a step holds beyond those of an ordinary backward pass, in bytes.

    Not in it are the heads' own gradients, nor the activations that K passes must keep until the last of them.

    Attributes:
        bytes: As the balancer is configured.
        jacobian: At most, with ``memory="jacobian"``: one gradient of all shared parameters for each task.
        gramian: At most, with ``memory="gramian"``.
    """

    bytes: int
    jacobian: int
    gramian: int


class _Site(NamedTuple):
    """A tensor to differentiate with respect to, and the layer or the places that yield its gradient, if any."""

    place: int  # among the inputs
    tensor: Tensor
    layer: Layer | None = None
    given: Tensor | None = None  # to the layer
    sparse: SparseRows | None = None  # where all gradients are sparse

    @property
    def target(self) -> Root:
        return self.tensor if self.layer is None else self.layer.edge

    @property
    def length(self) -> int:
        """Numbers that are kept for one task."""
        return self.tensor.numel() if self.layer is None else self.layer.samples * self.layer.outputs

    def read(self) -> _Site:
        """Return the site with the layer's input, which the graph will not hold for ever."""
        return self if self.layer is None else self._replace(given=self.layer.inputs())

    def coordinates(self, rows: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return the tensor's gradients in coordinates that keep inner products, flat."""
        if self.layer is None or self.given is None:
            return rows
        R = self.layer.triangle(self.given)
        return [None if row is None else self.layer.coordinates(R, row.view(self.layer.shape)).reshape(-1) for row in rows]

    def gradient(self, row: Tensor) -> Tensor:
        """Return the tensor's gradient."""
        if self.sparse is not None:
            return self.sparse.gradient(row)
        if self.layer is None or self.given is None:
            return unflat(row, self.tensor)
        return self.layer.weight_gradient(self.given, row.view(self.layer.shape))


@dataclass
class TaskGradients:
    """Gradients of K losses, and their weighted sums.

    Attributes:
        start: Where a further pass begins.
        parts: Leaves of the graph.
        gramian: Inner products, float64. Shape (K, K).
        reaches: For each of ``parts.inputs`` and each task, whether the task reaches it.
        heads: Gradients of the task-specific parameters.
        rows: The gradients, if they are stored by tensor.
        sites: The tensors of the rows.
        jacobian: The gradients as one matrix, where a rule sees it. Shape (K, P).
    """

    start: Start
    parts: Parts
    gramian: Gramian
    reaches: list[list[bool]]
    heads: HeadGradients = field(default_factory=lambda: HeadGradients([]))
    rows: Rows | None = None
    sites: Sequence[_Site] = ()
    jacobian: Jacobian | None = None
    sparse: dict[int, int] = field(default_factory=dict)  # by place, number of sparse dimensions; 0 if a row is dense

    @property
    def reached(self) -> list[bool]:
        """For each of ``parts.inputs``, whether any task reaches it."""
        return [any(tasks) for tasks in self.reaches]

    @property
    def reaching(self) -> list[bool]:
        """For each task, whether it reaches any of ``parts.inputs``."""
        return [any(tasks) for tasks in zip(*self.reaches, strict=True)]

    @property
    def needs_pass(self) -> bool:
        """Whether a weighted sum costs a further backward pass."""
        return self.rows is None or self.parts.source == "features"

    def weighted(self, weights: Sequence[float]) -> list[LeafGradient]:
        """Return the weighted sum of the tasks' gradients of the trunk, once: what is stored is dropped."""
        if self.rows is None or self.needs_pass:
            return paired(self.parts.trunk, weighted_sum(self.start, weights, self.parts.trunk))
        found = []
        for site, own, total in zip(self.sites, self.rows.pieces, self.rows.combined(weights), strict=True):
            own.clear()
            if total is not None:
                found.append((site.tensor, site.gradient(total)))
        return found

    def cut(self, direction: Direction) -> list[Tensor | None]:
        """Cut a direction into pieces for ``parts.inputs``, sparse where all gradients were. Shape (P,)."""
        found = pieces(direction, self.parts.inputs, self.reached)
        for place, dimensions in self.sparse.items():
            piece = found[place]
            found[place] = piece.to_sparse(dimensions) if piece is not None and dimensions else piece
        return found

    def follow(self, pieces: Sequence[Tensor | None]) -> None:
        """Replace the tasks' gradients of the features by one direction."""
        self.rows = Rows(1, [[None if piece is None else flat(piece)] for piece in pieces])
        self.start = AtFeatures(self.parts.inputs, self.rows)


class Engine:
    """Computation of the task gradients of a balancer; see `Balancer` for the choices."""

    def __init__(self, choice: EngineChoice, memory: Memory) -> None:
        self.choice, self.memory = choice, memory
        self.functions = Functions()
        self._refused = False  # whether an operation could not be batched
        self._batched: set[frozenset[type]] = set()  # kinds of nodes of graphs that have been batched

    def __reduce__(self) -> tuple[type[Engine], tuple[EngineChoice, Memory]]:
        return Engine, (self.choice, self.memory)  # a copy learns anew what its graphs allow

    def measure(self, start: AtLosses, parts: Parts, *, whole: bool) -> TaskGradients:
        """Compute the gradients of all tasks.

        Args:
            start: Passes that begin at the losses.
            parts: Leaves of the graph.
            whole: The Jacobian is needed as one matrix (K, P).

        Raises:
            RuntimeError: If the graph cannot be walked once for each task; ``.grad`` is then as before.
        """
        walked = parts.above.functions if parts.source == "features" else [*parts.above.functions, *parts.below.functions]
        leaves, targets = [*parts.trunk, *parts.heads], [*parts.inputs, *parts.heads]
        with ExitStack() as stack:
            stack.enter_context(without_hooks([*parts.trunk, *parts.heads]))
            if walked:
                stack.enter_context(self.functions.guarded(walked, start, targets, leaves))
            return self._measured(start, parts, whole=whole)

    def _measured(self, start: AtLosses, parts: Parts, *, whole: bool) -> TaskGradients:
        plain = [_Site(i, tensor) for i, tensor in enumerate(parts.inputs)]
        if parts.source == "features":
            found = self._collect(start, parts, [plain], parts.heads, "matrix" if whole else "rows", again=True)
            if found.rows is not None and parts.features:
                found.start = AtFeatures(parts.features, found.rows)
            return found
        form = "matrix" if whole else self._form(parts)
        blocks = [plain] if whole else self._blocks(parts, _sites(parts, start.num_tasks), form)
        batched = self._is_batched(parts, start.device)
        if not parts.features or not (batched or (form == "gramian" and _is_small(parts))):
            return self._collect(start, parts, blocks, parts.heads, form, batched=batched)
        above = parts._replace(inputs=parts.features)
        upper = self._collect(
            start, above, [[_Site(i, z) for i, z in enumerate(parts.features)]], parts.heads, "rows", again=True
        )
        assert upper.rows is not None
        found = self._collect(AtFeatures(parts.features, upper.rows), parts, blocks, [], form, batched=batched)
        found.heads = upper.heads
        if form != "gramian":
            upper.rows.pieces.clear()
        return found

    def _form(self, parts: Parts) -> Form:
        if len(parts.inputs) < len(parts.trunk):
            return "gramian"  # gradients of a part do not make a direction for the whole
        # Every further pass would compute checkpointed activations once more, and keep what it does not use
        return "gramian" if self.memory == "gramian" and not unpacks(parts.below) else "rows"

    def estimate(self, inputs: Sequence[Tensor], trunk: Sequence[Tensor], num_tasks: int, *, blocks: bool) -> Estimate:
        """Return the memory for gradients with respect to ``inputs``, in ``blocks`` of the tensors or not; see `Estimate`."""
        stored = num_tasks * _bytes(inputs)
        largest = max((p.numel() * p.element_size() for p in inputs), default=0)
        least = min(num_tasks * max(int(_SHARE * _bytes(trunk)), largest), stored) if blocks else stored
        return Estimate(least if self.memory == "gramian" else stored, stored, least)

    def _collect(
        self,
        start: Start,
        parts: Parts,
        blocks: Sequence[Sequence[_Site]],
        heads: Sequence[Tensor],
        form: Form,
        *,
        again: bool = False,
        batched: bool = False,
    ) -> TaskGradients:
        """Run the passes, block by block of the tensors, the heads in the first; ``again``: a further pass will follow."""
        K, inputs = start.num_tasks, parts.inputs
        device = inputs[0].device if inputs else start.device
        apart = again and parts.disjoint and bool(parts.features)
        found = TaskGradients(start, parts, torch.empty(0), [[False] * K for _ in inputs])
        if form == "matrix":
            found.jacobian = _matrix(inputs, K, device)
        length = sum(site.length for block in blocks for site in block)
        products = InnerProducts(K, length, device, lean=self.memory == "gramian")
        for number, block in enumerate(blocks):
            sites = [site.read() for site in block]
            keep = again or form == "gramian" or number < len(blocks) - 1
            targets = [*(site.target for site in sites), *(heads if number == 0 else ())]
            passes = self._passes(start, parts, targets, keep=keep, apart=apart, batched=batched)
            rows = Rows(K, [[] for _ in sites])
            for k, gradients in enumerate(passes):
                places = _places(found.jacobian, k, sites)
                for site, own, gradient, place in zip(sites, rows.pieces, gradients, places, strict=False):
                    own.append(_row(gradient, place, K if batched else 1))
                    if gradient is not None:  # 0 stands for a dense gradient, which makes the sum dense
                        dimensions = gradient.sparse_dim() if gradient.is_sparse else 0
                        found.sparse[site.place] = min(dimensions, found.sparse.get(site.place, dimensions))
                if number == 0:
                    found.heads.append(heads, gradients[len(sites) :])
            sites = _with_sparse_rows(sites, rows)
            for site, own in zip(sites, rows.pieces, strict=True):
                found.reaches[site.place] = [row is not None for row in own]
                products.add(site.coordinates(own))
                if form == "gramian":
                    own.clear()
            if form != "gramian":
                found.rows, found.sites = rows, sites
        found.gramian = products.total()
        return found

    def _passes(
        self, start: Start, parts: Parts, targets: Sequence[Root], *, keep: bool, apart: bool, batched: bool
    ) -> Iterable[Sequence[Tensor | None]]:
        if batched and not self._refused:
            kinds = frozenset(map(type, (*parts.above.users, *parts.below.users)))
            try:
                # A graph of unknown operations is kept, so that the loop can follow where one cannot be batched
                found = all_at_once(start, targets, keep=keep or kinds not in self._batched)
            except RuntimeError as error:
                if kinds in self._batched and not keep:  # parts of the graph may be gone
                    raise RuntimeError(
                        f"The backward passes of the tasks cannot be batched at this step, but could before: {error} "
                        "Use engine='loop'."
                    ) from error
                self._refused = True
                warn_caller(
                    f"The backward passes of the tasks cannot be batched and run one after the other: {error}".splitlines()[0]
                    + " Use engine='loop'."
                )
            else:
                self._batched.add(kinds)
                return _without_unreached(found, start, parts, targets)
        return explained(one_by_one(start, targets, keep=keep, apart=apart))

    def _is_batched(self, parts: Parts, device: torch.device) -> bool:
        """Whether all tasks go through the trunk in one pass: as the user says, or on an accelerator if they all fit."""
        if self.choice != "auto":
            return self.choice == "batched"
        if device.type == "cpu" or not parts.features:
            return False
        return activations(parts.below) <= sum(p.numel() for p in parts.trunk)

    def _blocks(self, parts: Parts, sites: Sequence[_Site], form: Form) -> list[list[_Site]]:
        """Return tensors that are measured in the same passes, the latest of the forward pass first."""
        if self.memory != "gramian" or form != "gramian":
            return [list(sites)]
        limit = _SHARE * sum(p.numel() for p in parts.trunk)
        depth = depths(parts.below, parts.inputs)
        blocks: list[list[_Site]] = [[]]
        for site in sorted(sites, key=lambda site: -depth[site.place]):
            if blocks[-1] and sum(other.length for other in blocks[-1]) + site.length > limit:
                blocks.append([])
            blocks[-1].append(site)
        return blocks


def _without_unreached(
    gradients: Sequence[Sequence[Tensor | None]], start: Start, parts: Parts, targets: Sequence[Root]
) -> list[list[Tensor | None]]:
    """Replace the zeros that a batched pass gives to a task where another task alone reaches a tensor by None."""
    if isinstance(start, AtLosses):
        reach = Reach(parts.above, start.roots)
        reaches = [reach.of(target) for target in targets]
    else:
        reach = Reach(parts.below, start.features)
        through = [reach.of(target) for target in targets]  # by feature
        reaches = [
            [
                any(there and own[k] is not None for there, own in zip(of_target, start.rows.pieces, strict=True))
                for k in range(start.num_tasks)
            ]
            for of_target in through
        ]
    return [[g if reaches[i][k] else None for i, g in enumerate(row)] for k, row in enumerate(gradients)]


def _with_sparse_rows(sites: Sequence[_Site], rows: Rows) -> list[_Site]:
    """Replace sparse gradients by dense numbers at common places, in the rows and in the sites."""
    found = []
    for i, site in enumerate(sites):
        sparse = sparse_rows(rows.pieces[i])
        if sparse is not None:
            rows.pieces[i] = list(sparse.rows)
            site = site._replace(sparse=sparse._replace(rows=[]))  # noqa: PLW2901
        elif any(row is not None and row.is_sparse for row in rows.pieces[i]):
            rows.pieces[i] = [None if row is None else flat(row) for row in rows.pieces[i]]
        found.append(site)
    return found


def _places(jacobian: Jacobian | None, k: int, block: Sequence[_Site]) -> Sequence[Tensor | None]:
    """Return where the gradients of task k go, if they go into one matrix."""
    return [None] * len(block) if jacobian is None else torch.split(jacobian[k], [site.tensor.numel() for site in block])


def _row(gradient: Tensor | None, place: Tensor | None, sharers: int) -> Tensor | None:
    """Return one task's gradient of one tensor as it is stored: flat, or sparse for now."""
    if gradient is None:
        return None
    if gradient.is_sparse and place is None:
        return gradient
    row = flat(gradient, sharers)
    return row if place is None else place.copy_(row)


def _matrix(inputs: Sequence[Tensor], num_tasks: int, device: torch.device) -> Jacobian:
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in inputs), torch.float32)
    return torch.zeros(num_tasks, sum(tensor.numel() for tensor in inputs), dtype=dtype, device=device)


def _sites(parts: Parts, num_tasks: int) -> list[_Site]:
    known = layers(parts.below, parts.inputs, lambda layer: _pays(layer, num_tasks))
    return [_Site(i, tensor, known.get(i)) for i, tensor in enumerate(parts.inputs)]


def _is_small(parts: Parts) -> bool:
    return sum(z.numel() for z in parts.features) <= _SMALL * sum(p.numel() for p in parts.trunk)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _direct_cost(layer: Layer, num_tasks: int) -> float:
    """Return the multiplications for the weight's gradients and their inner products."""
    return num_tasks * layer.weight.numel() * (layer.samples + _MOVED + _DOUBLE * num_tasks)


def _short_cost(layer: Layer, num_tasks: int) -> float:
    """Return the same through the gradients of the layer's outputs, with the product that makes the direction of them."""
    N, P = layer.samples, layer.weight.numel()
    return _DECOMPOSED * N * N * layer.width + num_tasks * N * layer.outputs * (N + _MOVED + _DOUBLE * num_tasks) + N * P


def _pays(layer: Layer, num_tasks: int) -> bool:
    return layer.samples < layer.width and _short_cost(layer, num_tasks) < _direct_cost(layer, num_tasks)
