"""Losses -> Jacobian, Jacobian -> Gramian, gradients -> ``.grad``. All autograd of the library is here.

The gradients of the losses are taken one task at a time, each through the graph of that loss alone, and are never
averaged or approximated. Rows are taken of the *raw* losses; what a loss balancer does to them is a K x K matrix
(`loss_jacobian`), which is exact for any rule and costs next to nothing.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from balance.shapes import Direction, Gramian, Jacobian, Losses, WeightedLosses, Weights

_BLOCK = 1 << 16  # columns of a Jacobian that are held in float64 at once: few enough for the cache


class TaskGradients(NamedTuple):
    """Gradients of K losses: with respect to where conflict is measured, and to the heads."""

    jacobian: Jacobian  # (K, P), with respect to the shared parameters or the features
    reached: list[bool]  # for each shared parameter or feature: whether any task reaches it
    heads: list[Tensor]  # the other parameters
    head_gradients: list[list[Tensor | None]]  # [task][head], None where the task does not reach the head
    head_squares: Tensor  # (K,), float64: squared lengths of the tasks' gradients with respect to all heads


def leaves(outputs: Iterable[Tensor]) -> list[Tensor]:
    """Leaf tensors that receive a gradient from any output, in the order of a walk through the graph."""
    found: dict[int, Tensor] = {}
    seen = set()
    stack = []
    for tensor in outputs:
        if tensor.grad_fn is not None:
            stack.append(tensor.grad_fn)
        elif tensor.requires_grad:  # a loss or a feature that is itself a parameter
            found[id(tensor)] = tensor
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        stack.extend(after for after, _ in node.next_functions if after is not None)
    return list(found.values())


def task_gradients(losses: Sequence[Tensor], inputs: Sequence[Tensor], heads: Sequence[Tensor], *, keep: bool) -> TaskGradients:
    """One backward pass for each loss.

    Args:
        losses: K scalars; one without a graph has gradient zero.
        inputs: Where conflict is measured: shared parameters, or features.
        heads: Other tensors whose gradients are wanted.
        keep: Keep the graph after the last pass.

    Returns:
        The rows, in the widest dtype among ``inputs``, at least float32, and on the device of the first.
    """
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in inputs), torch.float32)
    device = inputs[0].device if inputs else losses[0].device
    sizes = [tensor.numel() for tensor in inputs]
    jacobian = torch.zeros(len(losses), sum(sizes), dtype=dtype, device=device)
    squares = torch.zeros(len(losses), dtype=torch.float64, device=device)
    reached = [False] * len(inputs)
    head_gradients: list[list[Tensor | None]] = []
    wanted = [*inputs, *heads]
    last = max((k for k, loss in enumerate(losses) if loss.requires_grad), default=-1)
    for k, loss in enumerate(losses):
        gradients: Sequence[Tensor | None] = [None] * len(wanted)
        if wanted and loss.requires_grad:
            gradients = torch.autograd.grad(loss, wanted, retain_graph=keep or k != last, allow_unused=True)
        for i, (place, gradient) in enumerate(zip(torch.split(jacobian[k], sizes), gradients, strict=False)):
            if gradient is not None:
                place.copy_((gradient.to_dense() if gradient.is_sparse else gradient).flatten())
                reached[i] = True
        of_heads = list(gradients[len(inputs) :])
        for gradient in of_heads:
            if gradient is not None:
                entries = gradient.coalesce().values() if gradient.is_sparse else gradient
                squares[k] += entries.double().square().sum().to(device)
        head_gradients.append(of_heads)
    return TaskGradients(jacobian, reached, list(heads), head_gradients, squares)


def combined_gradients(
    losses: Sequence[Tensor], parameters: Sequence[Tensor], weights: Weights, *, keep: bool
) -> list[Tensor | None]:
    """Gradients of the weighted sum of the losses, by one ordinary backward pass; None where no loss reaches a parameter.

    Args:
        losses: K scalars; those without a graph are left out.
        parameters: Tensors of the graph.
        weights: Shape (K,).
        keep: Keep the graph.
    """
    live = [(loss, weight.to(loss)) for loss, weight in zip(losses, weights.unbind(), strict=True) if loss.requires_grad]
    if not live or not parameters:
        return [None] * len(parameters)
    scalars, factors = zip(*live, strict=True)
    return list(torch.autograd.grad(scalars, parameters, factors, retain_graph=keep, allow_unused=True))


def loss_jacobian(weighted: WeightedLosses, losses: Losses) -> Tensor:
    """How the weighted losses depend on the losses: entry (i, j) is ∂weighted_i/∂losses_j. Shape (K, K), float64."""
    rows = [torch.autograd.grad(row, losses, retain_graph=True, allow_unused=True)[0] for row in weighted.unbind()]
    return torch.stack([torch.zeros_like(losses) if row is None else row for row in rows]).detach().double()


def gramian(jacobian: Jacobian) -> Gramian:
    """Inner products of the rows, accumulated in float64 over blocks of columns. Shape (K, P) -> (K, K), float64."""
    G = torch.zeros(len(jacobian), len(jacobian), dtype=torch.float64, device=jacobian.device)
    for columns in torch.split(jacobian, _BLOCK, dim=1):
        block = columns.double()
        G += block @ block.T
    return G


def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Add to ``parameter.grad``, in place where there is one, as ``loss.backward()`` does."""
    gradient = gradient.detach().to(parameter)
    if gradient.shape != parameter.shape:
        gradient = gradient.reshape(parameter.shape)
    if parameter.grad is None:
        parameter.grad = gradient.clone()  # it may be a piece of a longer vector
    elif parameter.grad.is_sparse and not gradient.is_sparse:
        parameter.grad = gradient + parameter.grad
    else:
        parameter.grad += gradient


def add(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], factor: float = 1.0) -> None:
    """Add gradients, where there are any, times a factor to ``.grad`` of their parameters."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            accumulate(parameter, gradient if factor == 1.0 else factor * gradient)


def accumulate_direction(direction: Direction, inputs: Sequence[Tensor], reached: Sequence[bool]) -> None:
    """Add a direction to ``.grad`` of the shared parameters; those that no task reaches are left alone."""
    pieces = torch.split(direction, [tensor.numel() for tensor in inputs])
    for tensor, piece, any_task in zip(inputs, pieces, reached, strict=True):
        if any_task:
            accumulate(tensor, piece)


def accumulate_heads(gradients: TaskGradients, weights: Weights) -> None:
    """Add the weighted sum of the tasks' gradients to ``.grad`` of each head. ``weights``: shape (K,)."""
    for weight, row in zip(weights.unbind(), gradients.head_gradients, strict=True):
        for head, gradient in zip(gradients.heads, row, strict=True):
            if gradient is not None:
                accumulate(head, weight.to(gradient) * gradient)


def through_features(
    direction: Direction, features: Sequence[Tensor], reached: Sequence[bool], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of the parameters below the features, whose own gradient is ``direction``. Shape (F,)."""
    pieces = torch.split(direction, [tensor.numel() for tensor in features])
    there = [
        (z, piece.reshape(z.shape).to(z)) for z, piece, any_task in zip(features, pieces, reached, strict=True) if any_task
    ]
    outputs, gradients = zip(*there, strict=True)
    return list(torch.autograd.grad(outputs, parameters, gradients, allow_unused=True))
