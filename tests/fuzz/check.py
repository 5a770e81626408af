"""Run a step of the stage on an example and compare it with the oracle, and its layouts with an ordinary backward pass."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

import balance
from balance.engine import matrix_gradients
from tests.fuzz import oracle
from tests.fuzz.functions import changed
from tests.fuzz.networks import TASKS, Built, build

if TYPE_CHECKING:
    from balance.stage.report import Report
    from tests.fuzz.strategies import Call, Example

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def check(example: Example, mutate: Any = None) -> None:
    """Compare the stage with the oracle on one example.

    Args:
        example: Description of the network and of the step.
        mutate: Function of the stage's network, the expected outcome and the report, which damages what the stage did and
            returns the report to compare.

    Raises:
        oracle.Unusable: If the stage may refuse the example.
    """
    expected = oracle.expect(example)
    net, existing = prepared(example, expected.plan)
    stage = make_stage(example)
    if example.call.warm:
        warm_up(stage)
    try:
        report = run(stage, example.call, net, expected.plan)
    except ValueError as error:
        if expected.net.precision == torch.float16 and "must be finite" in str(error):
            raise oracle.Unusable from None
        raise
    except RuntimeError as error:
        # A batched pass leaves an unusable gradient in an inner tensor that retains it, over which a later pass stumbles
        if example.call.engine == "batched" and "escaped from inside a function being vmapped" in str(error):
            raise oracle.Unusable from None
        raise
    if mutate is not None:
        report = mutate(net, expected, report)
    step = compare_report(example.call, expected, report)
    compare_gradients(example, expected, step, net, existing)
    compare_layouts(example, expected, net, existing)
    compare_own(example.call, expected, stage)


def prepared(example: Example, plan: oracle.Plan) -> tuple[Built, dict[str, Tensor]]:
    """Build a network, add hooks on leaves and earlier gradients, and freeze the parameters of the plan."""
    net = build(example.network)
    generator = torch.Generator().manual_seed(example.network.seed)
    existing = {}
    for place, (name, leaf) in enumerate(net.leaves.items()):
        if leaf.requires_grad:
            for function in _hooks(example.call, place):
                leaf.register_hook(lambda g, function=function: changed(g, function))
            if place in example.call.existing:
                leaf.grad = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.dtype)
                existing[name] = leaf.grad
        if name not in plan.live:
            leaf.requires_grad_(False)
    return net, existing


def _hooks(call: Call, place: int) -> list[int]:
    return [function for where, function in call.leaf_hooks if where == place]


def make_stage(example: Example) -> balance.Balancer:
    """Build the stage of an example."""
    call = example.call
    registered = call.gradient in balance.gradient_balancers
    gradient: Any = call.gradient if registered else None if call.gradient == "none" else oracle.custom_rule(call.gradient)
    return balance.Balancer(
        tuple(TASKS[: len(example.network.tasks)]),
        loss=oracle.coupled if call.loss == "coupled" else call.loss,
        gradient=gradient,
        loss_options={"init": oracle.INIT} if call.loss == "uw" else None,
        gradient_options=oracle.options(call.gradient) or None,
        source=call.source,
        heads=call.heads,
        scale=call.scale,
        engine=call.engine,
        memory=call.memory,
    )


def warm_up(stage: balance.Balancer) -> None:
    """Make a step on a small ordinary network."""
    generator = torch.Generator().manual_seed(0)
    W, x = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    z = (x @ W.requires_grad_()).tanh()
    losses = {task: (z - k).square().mean() for k, task in enumerate(stage.tasks)}
    stage.backward(losses, shared=[W], features=z)
    stage.zero_grad(set_to_none=True)


def run(stage: balance.Balancer, call: Call, net: Built, plan: oracle.Plan) -> Report:
    """Call the stage."""
    losses: Any = {task: net.losses[task] for task in (reversed(plan.tasks) if call.reverse else plan.tasks)}
    if call.given != "dict":
        rows = [net.losses[task] for task in plan.tasks]
        losses = oracle.vector(rows) if call.given == "vector" else torch.stack([row.reshape(()) for row in rows])
    arguments: dict[str, Any] = {"features": _features(call, net, plan)}
    if plan.features is None or call.declare:
        arguments["shared"] = [net.leaves[name] for name in plan.shared]
    if plan.measured is not None:
        arguments["measure"] = [net.leaves[name] for name in plan.measured]
    if call.scaler is not None:
        arguments["scaler"] = torch.amp.GradScaler("cpu", init_scale=call.scaler)
    if call.factor is not None:
        arguments["factor"] = call.factor
    limit = matrix_gradients._SMALL_IN_A_BATCH if call.matrix else 0
    limits = mock.patch.multiple(matrix_gradients, _SMALL=limit, _SMALL_IN_A_BATCH=limit)
    with limits, torch.no_grad() if call.no_grad else contextlib.nullcontext():
        return stage.backward(losses, **arguments)


def _features(call: Call, net: Built, plan: oracle.Plan) -> Any:
    if plan.features is not None:
        features = [net.features[i] for i in plan.features]
        return features[0] if len(features) == 1 else features if call.reverse else dict(enumerate(features))
    choices = {"z": net.features, "first": net.features[:1], "inner": net.inner[:1], "nested": [*net.inner, *net.features]}
    features = [z for z in choices.get(call.hint, []) if z.requires_grad]
    return features or None


def compare_report(call: Call, expected: oracle.Expected, report: Report) -> oracle.Step:
    """Compare the report; return the step with the weights for the gradients."""
    rtol = 1e-9 if report.losses.dtype == torch.float64 else 1e-5
    assert list(report.tasks) == expected.plan.tasks
    _close("losses", report.losses, expected.losses, rtol)
    _close("weighted_losses", report.weighted_losses, expected.weighted_losses, rtol)
    _close("loss_weights", report.loss_weights, expected.loss_weights, rtol)
    if call.gradient == "none":
        assert report.gramian is None
    elif expected.balanced:
        _compare_gramian(expected, report.gramian)
    step = oracle.decide(call, expected, report.gramian)
    if step.weights is None:
        assert report.gradient_weights is None
        return step
    found = report.gradient_weights.double()
    outside = [k for k in range(len(found)) if k not in expected.rule_tasks]
    _close("gradient_weights outside the rule", found[outside], torch.ones(len(outside)).double(), rtol)
    if step.certain:
        lengths = TOLERANCE[expected.net.precision] if expected.plan.measured is not None else 0.0  # of whole gradients
        _close("gradient_weights", found, step.weights, max(rtol, 1e-7, lengths))
    exact = report.gradient_weights.dtype == torch.float64
    return step._replace(weights=found if exact or not step.certain else step.weights)


def _close(what: str, found: Tensor, right: Tensor, rtol: float) -> None:
    found, right = found.double(), right.double()
    assert found.shape == right.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(right.shape)}"
    size = float(right.abs().max()) if right.numel() else 0.0
    error = float((found - right).abs().max()) if right.numel() else 0.0
    assert error <= rtol * size + 1e-30, f"{what}: {found.tolist()}, expected {right.tolist()}"


def _compare_gramian(expected: oracle.Expected, gramian: Tensor) -> None:
    R = expected.rule_tasks
    rows = expected.E @ expected.J
    G, right = gramian.double()[R][:, R], (rows @ rows.T)[R][:, R]
    sizes = (expected.E.abs() @ (expected.J.norm(dim=1) + 1e-5 * expected.lengths))[R]
    error = (G - right).abs() / (sizes[:, None] * sizes).clamp(min=1e-200)
    rtol = TOLERANCE[expected.net.precision]
    assert not bool((error > rtol).any()), f"gramian: {G.tolist()}, expected {right.tolist()}"


def compare_gradients(
    example: Example, expected: oracle.Expected, step: oracle.Step, net: Built, existing: dict[str, Tensor]
) -> None:
    """Compare ``.grad`` of every leaf."""
    values = oracle.contributions(example.call, expected, step)
    rtol = TOLERANCE[expected.net.precision]
    largest = max(expected.scales.values(), default=0.0)
    _, before = prepared(example, expected.plan)
    for place, (name, leaf) in enumerate(net.leaves.items()):
        value = values.get(name)
        if value is None:
            unchanged = leaf.grad is None if name not in before else torch.equal(oracle.dense(leaf.grad), before[name].double())
            assert unchanged, f"{name} takes no part, but .grad is {leaf.grad}"
            continue
        hooks = _hooks(example.call, place)
        if float(value.abs().max()) > torch.finfo(leaf.dtype).max:
            raise oracle.Unusable  # half precision overflows
        value = oracle.with_leaf_hooks(value, hooks, sparse=expected.is_sparse(name))
        size = expected.scales[name] + (1e-3 if rtol < 1e-6 else 1.0) * largest
        if name in before:
            value, size = value + before[name].double(), size + 1.0 * (rtol > 1e-6) + 1e-6
        assert leaf.grad is not None, f"{name} is reached, but .grad is None"
        error = float((oracle.dense(leaf.grad) - value).abs().max())
        bound = rtol * 2 ** len(hooks) * size + 1e-30
        assert error <= bound, (
            f"{name}: error {error:.2e} of .grad {oracle.dense(leaf.grad).tolist()}, expected {value.tolist()}"
        )


def compare_layouts(example: Example, expected: oracle.Expected, net: Built, existing: dict[str, Tensor]) -> None:
    """Compare the form of every ``.grad`` with what an ordinary backward pass leaves."""
    plain, plain_existing = prepared(example, expected.plan)
    losses = [plain.losses[task].reshape(()) for task in expected.plan.tasks]
    (oracle.vector(losses) if example.call.given == "vector" else torch.stack(losses)).sum().backward()
    for name, leaf in net.leaves.items():
        found = _layout(leaf.grad, existing.get(name))
        right = _layout(plain.leaves[name].grad, plain_existing.get(name))
        assert found == right, f"{name}: layout {found}, expected {right}"


def _layout(gradient: Tensor | None, existing: Tensor | None) -> tuple[Any, ...]:
    if gradient is None:
        return ()
    if gradient.is_sparse:
        return (gradient.layout, gradient.dtype, gradient is existing)
    strides = tuple(s for s, n in zip(gradient.stride(), gradient.shape, strict=True) if n > 1)
    return (gradient.layout, gradient.dtype, gradient is existing, strides)


def compare_own(call: Call, expected: oracle.Expected, stage: balance.Balancer) -> None:
    """Compare the gradients of the loss balancer's own parameters."""
    found = [p.grad for p in stage.parameters()]
    if expected.own is None:
        return
    factor = (call.scaler or 1.0) * (call.factor or 1.0)
    own = iter((expected.own * factor).tolist())
    for task, gradient in zip(TASKS, found, strict=False):
        if task in expected.plan.tasks:
            value = next(own)
            assert gradient is not None, f"log-variance of {task}"
            assert abs(float(gradient) - value) <= 1e-5 * (1 + abs(value)), f"log-variance of {task}: {gradient}, not {value}"
        else:
            assert gradient is None
