"""Expected outcome of a step by explicit formulas: one backward pass for each task, and nothing that the library computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import balance
from tests.fuzz.functions import changed
from tests.fuzz.networks import TASKS, Built, build

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.fuzz.strategies import Call, Example

INIT = 0.3  # log-variances of uw
COUPLING = 0.2
FIXED = (0.7, -0.3, 1.9, 0.4, 1.1, -0.8)
SEED = 5  # of the rules that draw


class Unusable(Exception):  # noqa: N818 - no error: the example is one that the contract excludes
    """The stage may refuse this example."""


class Plan(NamedTuple):
    """Arguments of the step, as names and places."""

    live: list[str]  # leaves that require a gradient at the step
    shared: list[str]  # as declared
    measured: list[str] | None
    features: list[int] | None  # places among the features, where they are the source
    tasks: list[str]  # present


@dataclass
class Expected:
    """Outcome of a step, by the oracle."""

    plan: Plan
    losses: Tensor
    weighted_losses: Tensor
    loss_weights: Tensor
    own: Tensor | None  # gradients of the loss balancer's parameters, of all tasks
    E: Tensor
    rule_tasks: list[int]  # places of the tasks that take part in the gradient rule
    J: Tensor  # measured gradients of the losses
    lengths: Tensor  # of the whole gradients
    gradients: dict[str, list[Tensor | None]]  # by leaf and task
    trunk: set[str]  # leaves that get the direction
    pull: Callable[[Tensor], dict[str, Tensor | None]]  # a direction at the features to gradients of the leaves
    balanced: bool
    net: Built
    scales: dict[str, float] = field(default_factory=dict)

    def is_sparse(self, name: str) -> bool:
        """Return whether all contributions to a leaf are sparse."""
        return all(g.is_sparse for g in self.gradients[name] if g is not None)


def plan(example: Example, net: Built) -> Plan:
    """Settle the arguments of the step; raise `Unusable` where they make no valid step."""
    call, leaves = example.call, net.leaves
    names = list(leaves)
    later = {name for i, name in enumerate(names) if i in call.later and (call.source == "parameters" or name not in net.trunk)}
    live = [name for name in names if leaves[name].requires_grad and name not in later]
    heads = [name for name in names if name not in net.trunk and name != "input"]
    shared = [name for i, name in enumerate(net.trunk) if i not in call.excluded]
    shared += [name for i, name in enumerate(heads) if i in call.extra]
    shared = shared[::-1] if call.reverse else shared
    measured = None
    if call.measure is not None:
        measured = [name for i, name in enumerate(shared) if i in call.measure]
        measured = measured if any(name in live for name in measured) else None
    features = [i for i, z in enumerate(net.features) if z.requires_grad] if call.source == "features" else None
    if features == [] or not any(loss.requires_grad for loss in net.losses.values()):
        raise Unusable
    if not shared and (features is None or call.declare):
        raise Unusable
    return Plan(live, shared, measured, features, [task for task in TASKS if task in net.losses])


def expect(example: Example) -> Expected:
    """Compute what the step must do, up to the gradient rule."""
    net = build(example.network)
    plan_ = plan(example, net)
    given = {name: net.leaves[name] for name in plan_.live}
    features = [net.features[i] for i in plan_.features or ()]
    rows = _task_gradients(example.call.given, plan_.tasks, net.losses, list(given.values()), features)
    gradients = dict(zip(given, zip(*(row[: len(given)] for row in rows), strict=True), strict=False))
    gradients = {name: list(gradients.get(name, ())) for name in given}
    E, weighted, own = loss_rule(example.call.loss, net, plan_.tasks)
    values = torch.stack([net.losses[task].detach().reshape(()) for task in plan_.tasks])
    below = _below(features, given)
    trunk = {name for name in plan_.shared if name in given} | below
    places, reached = _measured(plan_, given, rows)
    reached = ((E != 0).double()[:, reached].sum(1) > 0).nonzero().flatten().tolist()  # by their weighted losses
    J = _matrix(places, features or [given[name] for name in _measured_names(plan_)], len(rows))
    trainable = bool(features) or any(name in given for name in plan_.shared)
    return Expected(
        plan_, values, weighted, E.sum(0), own, E, reached, J, _lengths(gradients, len(rows)), gradients, trunk,
        lambda direction: _pull(net, features, given, below, direction), trainable and example.call.gradient != "none", net,
    )  # fmt: skip


def _task_gradients(
    form: str, tasks: Sequence[str], losses: dict[str, Tensor], leaves: list[Tensor], features: list[Tensor]
) -> list[list[Tensor | None]]:
    roots = [losses[task] for task in tasks]
    if form == "vector":
        roots = list(vector(roots).unbind())
    # Apart, because torch returns a gradient from before the hooks on a tensor where the pass goes on below it
    return [[*_gradients(root, leaves), *_gradients(root, features)] for root in roots]


def _gradients(root: Tensor, inputs: list[Tensor]) -> Sequence[Tensor | None]:
    if not root.requires_grad or not inputs:
        return [None] * len(inputs)
    return torch.autograd.grad(root, inputs, torch.ones_like(root), retain_graph=True, allow_unused=True)


def vector(losses: Sequence[Tensor]) -> Tensor:
    """The losses as one tensor that is no plain stack."""
    return torch.stack([loss.reshape(()) for loss in losses]) * 1.0


def _measured_names(plan_: Plan) -> list[str]:
    names = plan_.shared if plan_.measured is None else plan_.measured
    return [name for name in names if name in plan_.live]


def _measured(
    plan_: Plan, given: dict[str, Tensor], rows: list[Sequence[Tensor | None]]
) -> tuple[list[list[Tensor | None]], list[int]]:
    """Measured gradients by task, and the tasks that take part in the gradient rule."""
    names = list(given)
    if plan_.features is not None:
        places = [list(row[len(names) :]) for row in rows]
        return places, [k for k, row in enumerate(places) if any(g is not None for g in row)]
    shared = [names.index(name) for name in plan_.shared if name in given]
    chosen = [names.index(name) for name in _measured_names(plan_)]
    reached = [k for k, row in enumerate(rows) if any(row[i] is not None for i in shared)]
    if shared and not reached:
        raise Unusable
    places = [[row[i] for i in chosen] for row in rows]
    if any(all(g is None for g in places[k]) for k in reached):
        raise Unusable  # a task that reaches shared parameters, but none of the measured ones
    return places, reached


def _matrix(rows: list[list[Tensor | None]], inputs: list[Tensor], count: int) -> Tensor:
    length = sum(tensor.numel() for tensor in inputs)
    flat = [
        torch.cat([_flat(g, tensor) for g, tensor in zip(row, inputs, strict=True)]) if length else torch.zeros(0).double()
        for row in rows
    ]
    return torch.stack(flat) if flat else torch.zeros(count, 0)


def _flat(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros(like.numel()).double() if gradient is None else dense(gradient).reshape(-1)


def dense(gradient: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach().double()


def _lengths(gradients: dict[str, list[Tensor | None]], count: int) -> Tensor:
    squares = torch.zeros(count, dtype=torch.float64)
    for row in gradients.values():
        for k, gradient in enumerate(row):
            if gradient is not None:
                squares[k] += dense(gradient).square().sum()
    return squares.sqrt()


def _below(features: list[Tensor], given: dict[str, Tensor]) -> set[str]:
    if not features or not given:
        return set()
    ones = [torch.ones_like(z) for z in features]
    found = torch.autograd.grad(features, list(given.values()), ones, retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(given, found, strict=True) if gradient is not None}


def _pull(
    net: Built, features: list[Tensor], given: dict[str, Tensor], below: set[str], direction: Tensor
) -> dict[str, Tensor | None]:
    """Carry a direction at the features on to the leaves; hooks on the features have acted before."""
    pieces = torch.split(direction, [z.numel() for z in features])
    net.switch.on = False
    starts = [piece.view(z.shape).to(z.dtype) for piece, z in zip(pieces, features, strict=True)]
    inputs = [given[name] for name in given if name in below]
    found = torch.autograd.grad(features, inputs, starts, retain_graph=True, allow_unused=True) if inputs else []
    net.switch.on = True
    return dict(zip((name for name in given if name in below), found, strict=True))


def coupled(losses: Tensor) -> Tensor:
    """Loss rule whose every value depends on all losses."""
    return losses * (1 + COUPLING * losses.sum())


def loss_rule(name: str, net: Built, tasks: list[str]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Derivative of a loss rule (K, K), its values (K,), and the gradients of the rule's parameters, of all tasks."""
    L = torch.stack([net.losses[task].detach().reshape(()).double() for task in tasks])
    if name == "scaleinvls":
        return (1 / L).diag(), L.log(), None
    if name == "coupled":
        total = COUPLING * L.sum()
        return torch.eye(len(L)).double() * (1 + total) + COUPLING * L[:, None], L * (1 + total), None
    if name == "uw":
        s = torch.tensor(INIT).double()
        factor = 0.5 * (-s).exp()
        return factor * torch.eye(len(L)).double(), factor * L + 0.5 * s, 0.5 - factor * L
    return torch.eye(len(L)).double(), L, None


def custom_rule(name: str) -> Callable[[Tensor], Tensor]:
    """Gradient rules that are plain callables."""
    return {
        "ones": lambda G: torch.ones(len(G), dtype=torch.float64),
        "fixed": lambda G: torch.tensor(FIXED[: len(G)], dtype=torch.float64),
        "smooth": lambda G: 1 / (G.diagonal().clamp(min=0).sqrt() + 1e-3),
    }[name]


def options(name: str) -> dict[str, int]:
    """Options of a registered gradient rule."""
    return {"seed": SEED} if name in ("pcgrad", "graddrop") else {}


def gradient_rule(name: str, num_tasks: int) -> Callable[[Tensor], Tensor]:
    """A fresh rule for so many tasks."""
    if name in ("ones", "fixed", "smooth"):
        return custom_rule(name)
    return balance.gradient_balancers.build(name, num_tasks=num_tasks, **options(name))


class Step(NamedTuple):
    """Weights or direction of a step, by the oracle."""

    weights: Tensor | None  # (K,), ones for the tasks outside the rule
    certain: bool  # whether the weights can be told exactly
    direction: Tensor | None = None  # where the rule sees the Jacobian


def decide(call: Call, expected: Expected, gramian: Tensor | None) -> Step:
    """Apply the gradient rule, to the block of the Gramian that the stage reports."""
    weights = torch.ones(len(expected.losses), dtype=torch.float64)
    if not expected.balanced:
        return Step(weights, certain=True)
    R = expected.rule_tasks
    if call.gradient == "graddrop":
        rows = (expected.E @ expected.J)[R]
        direction = gradient_rule("graddrop", len(R))(rows.to(_jacobian_dtype(expected))).double()
        total = rows.sum(0)
        certain = True
        if call.scale == "norm" and direction.norm() > 0:
            direction = direction * total.norm() / direction.norm()
        return Step(None, certain, direction)
    assert gramian is not None
    block = gramian[R][:, R]
    found = gradient_rule(call.gradient, len(R))(block.clone()).double()
    weights[R], certain = _scaled(call.scale, found, block)
    if expected.plan.measured is not None and set(_measured_names(expected.plan)) < expected.trunk:
        factor, known = _whole_length(call, expected, found, block)
        weights[R], certain = (found * factor if factor is not None else weights[R]), certain and known
    return Step(weights, certain)


def _whole_length(call: Call, expected: Expected, weights: Tensor, G: Tensor) -> tuple[float | None, bool]:
    """Factor that gives the direction of all shared parameters the length that is meant where only some were measured."""
    if call.scale == "sum" or (call.scale == "paper" and call.gradient != "nashmtl"):
        return None, True
    E = expected.E[expected.rule_tasks]
    length, most = _length_of_sum(expected, weights @ E)
    if call.scale == "norm":
        target, size = _length_of_sum(expected, E.sum(0))
    else:
        target = size = max(float(weights @ G @ weights), 0.0) ** 0.5
    if length <= 1e-5 * most:
        return None, False
    return target / length, target > 1e-5 * size


def _length_of_sum(expected: Expected, coefficients: Tensor) -> tuple[float, float]:
    """Length of a weighted sum of the gradients of all shared parameters, and the largest that it could have."""
    square, most = 0.0, 0.0
    for name in expected.trunk:
        terms = [c * dense(g) for c, g in zip(coefficients.tolist(), expected.gradients[name], strict=True) if g is not None]
        if terms:
            square += float(sum(terms).square().sum())
            most += float(sum(term.norm() for term in terms)) ** 2
    return square**0.5, most**0.5


def _jacobian_dtype(expected: Expected) -> torch.dtype:
    leaves = [expected.net.leaves[name] for name in _measured_names(expected.plan)]
    inputs = [expected.net.features[i] for i in expected.plan.features] if expected.plan.features else leaves
    low = all(tensor.dtype != torch.float64 for tensor in inputs)
    return torch.float32 if low else torch.float64


def _scaled(scale: str, weights: Tensor, G: Tensor) -> tuple[Tensor, bool]:
    total, size = float(weights.sum()), float(weights.abs().sum())
    if scale == "sum":
        return weights * (len(G) / total if total > 0 else 1.0), abs(total) > 1e-9 * size
    if scale == "norm":
        square, most = float(weights @ G @ weights), float(weights.abs() @ G.diagonal().clamp(min=0).sqrt()) ** 2
        certain = square > 1e-9 * most or most == 0
        return (weights * (max(float(G.sum()), 0.0) / square) ** 0.5 if square > 1e-9 * most else weights), certain
    return weights, True


def contributions(call: Call, expected: Expected, step: Step) -> dict[str, Tensor | None]:
    """Return the gradients that the step adds to ``.grad`` of every live leaf, before hooks on the leaf."""
    K = len(expected.losses)
    E = expected.E
    plain = torch.ones(K, dtype=torch.float64) @ E
    rows = plain if step.weights is None else step.weights @ E
    weighted = call.heads == "weighted" or (
        call.heads is None and call.gradient in balance.gradient_balancers
        and balance.gradient_balancers.heads(call.gradient) == "weighted"
    )  # fmt: skip
    factor = (call.scaler or 1.0) * (call.factor or 1.0)
    direction = {} if step.direction is None else _pieces(expected, step.direction)
    result: dict[str, Tensor | None] = {}
    for name, row in expected.gradients.items():
        in_trunk = name in expected.trunk
        coefficients = rows if in_trunk or weighted else plain
        terms = [(c * factor, dense(g)) for c, g in zip(coefficients.tolist(), row, strict=True) if g is not None]
        expected.scales[name] = sum(abs(c) * float(g.abs().max()) for c, g in terms if g.numel())
        value = sum(c * g for c, g in terms) if terms else None
        if in_trunk and step.direction is not None and value is not None:
            value = direction[name] * factor
        result[name] = value
    return result


def _pieces(expected: Expected, direction: Tensor) -> dict[str, Tensor]:
    leaves = expected.net.leaves
    if expected.plan.features is not None:
        pulled = expected.pull(direction)
        return {name: torch.zeros_like(leaves[name]).double() if g is None else dense(g) for name, g in pulled.items()}
    names = _measured_names(expected.plan)
    cuts = torch.split(direction, [leaves[name].numel() for name in names])
    return {name: cut.view(leaves[name].shape) for name, cut in zip(names, cuts, strict=True)}


def with_leaf_hooks(value: Tensor, functions: Sequence[int], *, sparse: bool) -> Tensor:
    """Apply the hooks of a leaf to its final gradient."""
    for function in functions:
        value = changed(value.to_sparse(), function).to_dense() if sparse else changed(value, function)
    return value
