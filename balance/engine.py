"""How the task gradients of one step are had: in which passes, in which form, and what of them is held."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from balance.graph import Layer, Root, activations, depths, layers
from balance.jacobian import (
    AtFeatures,
    AtLosses,
    HeadGradients,
    InnerProducts,
    Rows,
    Start,
    accumulate,
    all_at_once,
    backward,
    flat,
    one_by_one,
    pieces,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from balance.parts import Parts
    from balance.shapes import Direction, EngineChoice, Gramian, Jacobian, Memory

Form = Literal["rows", "matrix", "gramian"]

_SHARE = 0.4  # of the Jacobian: what is held of it at most with memory="gramian", unless one parameter alone is larger
_SMALL = 0.1  # of the shared parameters: features that are fewer may be held for every task
# What it costs to move a number about, a multiplication in double precision, and one in a QR decomposition, relative to one
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
    """A tensor whose gradients are wanted, and the layer through which they are had, if through one."""

    place: int  # among the inputs
    tensor: Tensor
    layer: Layer | None = None
    given: Tensor | None = None  # to the layer

    @property
    def target(self) -> Root:
        return self.tensor if self.layer is None else self.layer.edge

    @property
    def length(self) -> int:
        """Numbers that are held for one task."""
        return self.tensor.numel() if self.layer is None else self.layer.samples * self.layer.outputs

    def read(self) -> _Site:
        """The same with what the layer was given, which the graph will not hold for ever."""
        return self if self.layer is None else self._replace(given=self.layer.inputs())

    def coordinates(self, rows: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The tensor's gradients in coordinates that keep inner products, flat."""
        if self.layer is None or self.given is None:
            return rows
        R = self.layer.triangle(self.given)
        return [None if row is None else self.layer.coordinates(R, self._unflat(row)).reshape(-1) for row in rows]

    def gradient(self, row: Tensor) -> Tensor:
        """The tensor's gradient."""
        if self.layer is None or self.given is None:
            return row
        return self.layer.weight_gradient(self.given, self._unflat(row))

    def _unflat(self, row: Tensor) -> Tensor:
        assert self.layer is not None
        return row.view(self.layer.shape)


@dataclass
class TaskGradients:
    """Gradients of K losses, measured, and able to become a direction."""

    start: Start  # where a further pass begins
    parts: Parts
    gramian: Gramian  # (K, K), float64
    reached: list[bool]  # for each of ``parts.inputs``, whether any task reaches it
    heads: HeadGradients = field(default_factory=HeadGradients)
    rows: Rows | None = None  # where they are stored
    sites: Sequence[_Site] = ()  # what they are gradients of
    jacobian: Jacobian | None = None  # (K, P), where a rule must see it

    def accumulate(self, weights: Sequence[float]) -> None:
        """Add the weighted sum of the tasks' gradients to ``.grad`` of the trunk, once. ``weights``: (K,)."""
        if self.rows is None or self.parts.source == "features":
            backward(self.start, weights, self.parts.trunk)
            return
        held = zip(self.sites, self.rows.pieces, self.rows.combined(weights), strict=True)
        for site, own, total in held:
            own.clear()
            if total is not None:
                accumulate(site.tensor, site.gradient(total), fresh=True)

    def accumulate_direction(self, direction: Direction) -> None:
        """Add a direction, of the parameters or of the features, to ``.grad`` of the trunk, once. Shape (P,)."""
        parts = self.parts
        found = pieces(direction, parts.inputs, self.reached)
        if parts.source == "parameters":
            for parameter, piece in zip(parts.inputs, found, strict=True):
                if piece is not None:
                    accumulate(parameter, piece)
            return
        rows = Rows(1, [[None if piece is None else piece.reshape(-1)] for piece in found])
        backward(AtFeatures(parts.inputs, rows), [1.0], parts.trunk)


class Engine:
    """How a balancer has its task gradients; see `Balancer` for the choices."""

    def __init__(self, choice: EngineChoice, memory: Memory) -> None:
        self.choice, self.memory = choice, memory
        self._batches: bool | None = None  # whether the operations can be batched; None: not tried yet

    def measure(self, start: AtLosses, parts: Parts, *, whole: bool) -> TaskGradients:
        """Gradients of all tasks.

        Args:
            start: Passes that begin at the losses.
            parts: Leaves of the graph.
            whole: The Jacobian is wanted as one matrix (K, P).
        """
        plain = [_Site(i, tensor) for i, tensor in enumerate(parts.inputs)]
        if parts.source == "features":
            found = self._collect(start, parts, [plain], parts.heads, "matrix" if whole else "rows", again=True)
            if found.rows is not None and parts.features:
                found.start = AtFeatures(parts.features, found.rows)
            return found
        if whole:
            form: Form = "matrix"
        else:  # gradients of a part do not make a direction for the whole
            form = "gramian" if self.memory == "gramian" or len(parts.inputs) < len(parts.trunk) else "rows"
        blocks = [plain] if whole else self._blocks(parts, _sites(parts, start.num_tasks))
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

    def estimate(self, inputs: Sequence[Tensor], trunk: Sequence[Tensor], num_tasks: int, *, blocks: bool) -> Estimate:
        """Memory for gradients with respect to ``inputs``, which can be taken in blocks or not; see `Estimate`."""
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
        found = TaskGradients(start, parts, torch.empty(0), [False] * len(inputs))
        if form == "matrix":
            found.jacobian = _matrix(inputs, K, device)
        length = sum(site.length for block in blocks for site in block)
        products = InnerProducts(K, length, device, lean=self.memory == "gramian")
        for number, block in enumerate(blocks):
            sites = [site.read() for site in block]
            keep = again or form == "gramian" or number < len(blocks) - 1
            targets = [*(site.target for site in sites), *(heads if number == 0 else ())]
            passes = self._passes(start, targets, keep=keep, apart=apart, batched=batched)
            rows = Rows(K, [[] for _ in sites])
            for k, gradients in enumerate(passes):
                places = _places(found.jacobian, k, sites)
                for i, own in enumerate(rows.pieces):
                    own.append(_row(gradients[i], places[i], K if batched else 1))
                if number == 0:
                    found.heads.append(heads, gradients[len(sites) :])
            for site, own, there in zip(sites, rows.pieces, rows.reached, strict=True):
                found.reached[site.place] = there
                products.add(site.coordinates(own))
                if form == "gramian":
                    own.clear()
            if form != "gramian":
                found.rows, found.sites = rows, sites
        found.gramian = products.total()
        return found

    def _passes(
        self, start: Start, targets: Sequence[Root], *, keep: bool, apart: bool, batched: bool
    ) -> Iterable[Sequence[Tensor | None]]:
        if batched and self._batches is not False:
            try:
                found = all_at_once(start, targets, keep=keep or self._batches is None)
            except RuntimeError as error:
                if self._batches:  # the graph may be gone
                    raise
                self._batches = False
                warnings.warn(
                    f"The backward passes of the tasks cannot be batched and run one after the other: {error}".splitlines()[0]
                    + " Use engine='loop'.",
                    stacklevel=6,
                )
            else:
                self._batches = True
                return found
        return one_by_one(start, targets, keep=keep, apart=apart)

    def _is_batched(self, parts: Parts, device: torch.device) -> bool:
        """Whether all tasks go through the trunk in one pass: as the user says, or on an accelerator if they all fit."""
        if self.choice != "auto":
            return self.choice == "batched"
        if device.type == "cpu" or not parts.features:
            return False
        return activations(parts.below) <= sum(p.numel() for p in parts.trunk)

    def _blocks(self, parts: Parts, sites: Sequence[_Site]) -> list[list[_Site]]:
        """Tensors that are measured in the same passes, the latest of the forward pass first."""
        if self.memory != "gramian":
            return [list(sites)]
        limit = _SHARE * sum(p.numel() for p in parts.trunk)
        depth = depths(parts.below, parts.inputs)
        blocks: list[list[_Site]] = [[]]
        for site in sorted(sites, key=lambda site: -depth[site.place]):
            if blocks[-1] and sum(other.length for other in blocks[-1]) + site.length > limit:
                blocks.append([])
            blocks[-1].append(site)
        return blocks


def _places(jacobian: Jacobian | None, k: int, block: Sequence[_Site]) -> Sequence[Tensor | None]:
    """Where the gradients of task k go, if they go into one matrix."""
    return [None] * len(block) if jacobian is None else torch.split(jacobian[k], [site.tensor.numel() for site in block])


def _row(gradient: Tensor | None, place: Tensor | None, sharers: int) -> Tensor | None:
    """One task's gradient of one tensor, as it is held."""
    if gradient is None:
        return None
    row = flat(gradient, sharers)
    return row if place is None else place.copy_(row)


def _matrix(inputs: Sequence[Tensor], num_tasks: int, device: torch.device) -> Jacobian:
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in inputs), torch.float32)
    return torch.zeros(num_tasks, sum(tensor.numel() for tensor in inputs), dtype=dtype, device=device)


def _sites(parts: Parts, num_tasks: int) -> list[_Site]:
    known = layers(parts.below, parts.inputs)
    return [
        _Site(i, tensor, known[i] if i in known and _pays(known[i], num_tasks) else None)
        for i, tensor in enumerate(parts.inputs)
    ]


def _is_small(parts: Parts) -> bool:
    return sum(z.numel() for z in parts.features) <= _SMALL * sum(p.numel() for p in parts.trunk)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _direct_cost(layer: Layer, num_tasks: int) -> float:
    """Multiplications for the weight's gradients and their inner products."""
    return num_tasks * layer.weight.numel() * (layer.samples + _MOVED + _DOUBLE * num_tasks)


def _short_cost(layer: Layer, num_tasks: int) -> float:
    """The same through the gradients of the layer's outputs, with the product that makes the direction of them."""
    N, P = layer.samples, layer.weight.numel()
    return _DECOMPOSED * N * N * layer.width + num_tasks * N * layer.outputs * (N + _MOVED + _DOUBLE * num_tasks) + N * P


def _pays(layer: Layer, num_tasks: int) -> bool:
    return layer.samples < layer.width and _short_cost(layer, num_tasks) < _direct_cost(layer, num_tasks)
