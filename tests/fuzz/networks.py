"""Random networks: a small description that hypothesis draws, and the network that is built from it, the same each time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tests.fuzz.functions import LINEAR, Hook, Passage, Switch, hooked
from tests.fuzz.operations import OPERATIONS, fit, segment

if TYPE_CHECKING:
    from tests.fuzz.operations import Forward

TASKS = "abcdef"


class Op(NamedTuple):
    """One operation of a network."""

    kind: str  # a key of OPERATIONS
    variant: int
    hook: Hook | None = None


class Task(NamedTuple):
    """One task: its head, and its loss.

    Kinds:

    * ``normal``
    * ``detached`` from the trunk
    * ``constant``
    * ``absent``
    * ``penalty`` on the gradient of its output
    * ``direct``: a penalty on the first trunk parameter
    * ``same``: the loss of the task before
    * ``leaf``: a separate parameter
    """

    kind: str
    ops: tuple[Op, ...]
    taps: int  # bits: which of the features it uses; at least one
    form: int  # formula of the loss
    size: int  # exponent of ten
    hook: Hook | None = None  # on the loss
    float32: bool = False
    shape: tuple[int, ...] = ()


class Network(NamedTuple):
    """Description of a network."""

    seed: int
    batch: int
    width: int
    trunk: tuple[Op, ...]
    tasks: tuple[Task, ...]
    outputs: str = "one"  # features: "one", "two" from operations of their own, or "chunk", two views
    feature_hooks: tuple[Hook | None, Hook | None] = (None, None)
    segment: tuple[str, int, int] | None = None  # "checkpoint" or "saved", first and last operation
    frozen: frozenset[int] = frozenset()  # places of parameters in the order of their creation
    strided: frozenset[int] = frozenset()  # those whose memory is not contiguous
    input_grad: bool = False
    bypass: bool = False  # heads may use weights of the trunk

    def is_linear(self) -> bool:
        """Return whether all hooks inside the graph are linear functions."""
        ops = [*self.trunk, *(op for task in self.tasks for op in task.ops)]
        hooks = [*(op.hook for op in ops), *(task.hook for task in self.tasks), *self.feature_hooks]
        return all(hook is None or hook.factor < LINEAR for hook in hooks)


class Maker:
    """Create the parameters and constants of a network, in a fixed order from a fixed seed."""

    def __init__(self, spec: Network) -> None:
        self.spec, self.width, self.batch = spec, spec.width, spec.batch
        self.leaves: dict[str, Tensor] = {}
        self.trunk: list[str] = []  # names
        self.squares: list[Tensor] = []
        self.in_trunk = True
        self.precision = torch.float64
        self.weight_hook: Hook | None = None
        self._generator = torch.Generator().manual_seed(spec.seed)

    def constant(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def mask(self, *shape: int) -> Tensor:
        return torch.bernoulli(torch.full(shape, 0.7, dtype=torch.float64), generator=self._generator)

    def integers(self, limit: int, count: int) -> Tensor:
        return torch.randint(limit, (count,), generator=self._generator)

    def leaf(self, *shape: int, scale: float = 0.6, dtype: torch.dtype = torch.float64, channels_last: bool = False) -> Tensor:
        """Create a parameter; its memory may be transposed, in channels-last order, or full of gaps."""
        value = (self.constant(*shape) * scale).to(dtype)
        odd = len(self.leaves) in self.spec.strided
        if len(shape) == 4 and (odd or channels_last):
            value = value.contiguous(memory_format=torch.channels_last)
        elif len(shape) == 2 and odd and self.spec.seed % 2:
            value = value.t().contiguous().t()
        elif shape and odd:
            value = torch.stack([value, value], dim=-1)[..., 0]
        return self._register(value.detach())

    def weight(self, rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
        W = self.leaf(rows, columns, scale=1.1 / columns**0.5, dtype=dtype)
        if rows == columns == self.width and dtype == torch.float64 and (self.in_trunk or not self.spec.bypass):
            self.squares.append(W)
        return W

    def known_square(self, number: int) -> Tensor:
        return self.squares[number % len(self.squares)] if self.squares else self.weight(self.width, self.width)

    def module(self, module: nn.Module) -> nn.Module:
        module.double()
        for parameter in module.parameters():
            parameter.data.copy_(self.constant(*parameter.shape) * 0.6)
            self._register(parameter)
        return module

    def touch(self, weight: Tensor) -> Tensor:
        """Put the hook of the operation on a view of a weight, if that is what the description asks for."""
        hook = self.weight_hook
        return weight if hook is None else hooked(weight, hook._replace(kind="tensor"))

    def lower(self, dtype: torch.dtype) -> None:
        if torch.finfo(dtype).eps > torch.finfo(self.precision).eps:
            self.precision = dtype

    def op(self, op: Op, switch: Switch | None = None) -> Forward:
        """Build an operation with its hook, which acts while the switch is on."""
        inner = OPERATIONS[op.kind](self, op.variant)
        hook = op.hook
        passage = Passage(hook) if hook is not None and hook.kind.startswith("module") else None

        def forward(h: Tensor) -> Tensor:
            self.weight_hook = hook if hook is not None and hook.kind == "weight" else None
            out = inner(h)
            self.weight_hook = None
            if passage is not None:
                return passage(out) if out.requires_grad else out
            return hooked(out, hook, switch)

        return forward

    def _register(self, leaf: Tensor) -> Tensor:
        place = len(self.leaves)
        leaf.requires_grad_(place not in self.spec.frozen)
        name = f"{'trunk' if self.in_trunk else 'head'}.{place}"
        self.leaves[name] = leaf
        if self.in_trunk:
            self.trunk.append(name)
        return leaf


class Built(NamedTuple):
    """A network after its forward pass."""

    leaves: dict[str, Tensor]
    trunk: list[str]  # names of the parameters of the trunk
    features: list[Tensor]
    inner: list[Tensor]  # outputs of the operations of the trunk
    losses: dict[str, Tensor]  # of the tasks that are present
    precision: torch.dtype  # the lowest on the way
    switch: Switch  # of the tensor hooks on the features


def build(spec: Network) -> Built:
    """Build a network and run its forward pass."""
    make = Maker(spec)
    x = make.constant(spec.batch, spec.width)
    switch = Switch()
    trunk = [make.op(op) for op in spec.trunk[:-1]]
    trunk.append(make.op(spec.trunk[-1], switch if spec.outputs == "one" else None))
    outputs = [make.op(Op("linear", 3)), make.op(Op("custom", 5))] if spec.outputs == "two" else []
    inner = _run_trunk(spec, trunk, x.requires_grad_(spec.input_grad))
    features = _features(spec, outputs, inner[-1], switch)
    make.in_trunk = False
    if not spec.bypass:
        make.squares = []
    losses: dict[str, Tensor] = {}
    for name, task in zip(TASKS, spec.tasks, strict=False):
        loss = _loss(make, task, features, losses)
        if task.kind != "absent":
            losses[name] = loss
    leaves = {**make.leaves, "input": x} if spec.input_grad else make.leaves
    return Built(leaves, make.trunk, features, inner, losses, make.precision, switch)


def _run_trunk(spec: Network, trunk: list[Forward], h: Tensor) -> list[Tensor]:
    outputs = []
    kind, first, last = spec.segment or ("", len(trunk), -1)

    def part(h: Tensor) -> Tensor:
        for op in trunk[first : last + 1]:
            h = op(h)
        return h

    for number, op in enumerate(trunk):
        if first < number <= last:
            continue
        h = segment(part, kind)(h) if number == first <= last else op(h)
        outputs.append(h)
    return outputs


def _features(spec: Network, outputs: list[Forward], h: Tensor, switch: Switch) -> list[Tensor]:
    if spec.outputs == "chunk":
        features = list(h.chunk(2, dim=1))
    elif outputs:
        features = [output(h) for output in outputs]
    else:
        features = [h]
    return [hooked(z, hook, switch) for z, hook in zip(features, spec.feature_hooks, strict=False)]


def _loss(make: Maker, task: Task, features: list[Tensor], losses: dict[str, Tensor]) -> Tensor:
    """Build a head and compute its loss, which is positive."""
    used = [z for i, z in enumerate(features) if task.taps >> i & 1] or features[:1]
    head = [make.op(op) for op in task.ops]
    W, target = make.leaf(2, make.width), make.constant(make.batch, 2)
    own = make.leaf()
    if task.kind == "same" and losses:
        return list(losses.values())[-1]
    if task.kind == "constant":
        return target.square().mean()
    if task.kind == "leaf":
        with torch.no_grad():
            own.copy_(own.abs() + 0.1)
        return own
    if task.kind == "direct":
        first = make.leaves[make.trunk[0]] if make.trunk and make.spec.bypass else W
        loss = first.double().square().mean() + 0.1
    else:
        loss = _output_loss(task, [z.detach() for z in used] if task.kind == "detached" else used, head, W, target)
    loss = hooked(loss * 10.0**task.size, task.hook)
    if task.float32:
        make.lower(torch.float32)
        loss = loss.float()
    return loss.reshape(task.shape)


def _output_loss(task: Task, features: list[Tensor], head: list[Forward], W: Tensor, target: Tensor) -> Tensor:
    h = fit(torch.cat(features, dim=1), W.shape[1]) if len(features) > 1 else fit(features[0], W.shape[1])
    for op in head:
        h = op(h)
    out = h @ W.t()
    error = out - target
    loss = (
        error.square().mean,
        lambda: nn.functional.softplus(error).mean() + error.square().mean() * 0.1,
        lambda: error.logsumexp(dim=1).square().mean(),
        lambda: nn.functional.cross_entropy(out, target.softmax(1)),
    )[task.form]() + 0.1
    sources = [z for z in features if z.requires_grad]
    if task.kind == "penalty" and sources:
        slopes = torch.autograd.grad(out.tanh().sum(), sources, create_graph=True, allow_unused=True)
        loss = loss + sum(0.3 * slope.square().sum() for slope in slopes if slope is not None)
    return loss
