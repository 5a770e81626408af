"""Ordinary backward passes, for graphs that require one, and checks that gradients are finite before they are written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..engine.accumulate import are_finite, cast_to_leaf, gradient_sum, surrogate_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..engine.accumulate import LeafGradient
    from ..engine.passes import Outputs


class NotFiniteError(ValueError):
    """A gradient has an infinite or NaN entry; ``.grad`` is as before."""


def require_finite(pairs: Sequence[LeafGradient], tasks: Sequence[str]) -> None:
    """Check gradients in the dtype of their leaf tensors, since a cast can overflow.

    Args:
        pairs: Leaf tensors and gradients.
        tasks: Names of the tasks, for the message.

    Raises:
        NotFiniteError: If an entry is infinite or NaN.
    """
    if not are_finite([cast_to_leaf(gradient, leaf) for leaf, gradient in pairs]):
        raise NotFiniteError(
            f"Gradients must be finite, but the weighted sum of the gradients of {', '.join(tasks)} is not. "
            "Look at the learning rate, and at operations whose gradients overflow."
        )


def run_ordinary_backward(
    outputs: Outputs, weights: list[float], others: list[LeafGradient], trunk: Sequence[Tensor], tasks: Sequence[str]
) -> None:
    """Run an ordinary backward pass, in which every leaf tensor accumulates, for functions that require one.

    Args:
        outputs: Tensors at which the pass begins.
        weights: Weight of each task.
        others: Gradients of further leaf tensors, accumulated in the same pass.
        trunk: Leaf tensors that the pass reaches.
        tasks: Names of the tasks, for messages.

    Raises:
        NotFiniteError: If a gradient is not finite; ``.grad`` is then as before.
    """
    roots, cotangents = outputs.weighted_cotangents(weights)
    if (total := surrogate_loss(others)) is not None:
        roots.append(total)
        cotangents.append(torch.ones_like(total))
    before = [(leaf, leaf.grad) for leaf in (*trunk, *(leaf for leaf, _ in others))]
    for leaf, _ in before:
        leaf.grad = None
    try:
        with outputs.pass_context():
            torch.autograd.backward(roots, cotangents)  # type: ignore[arg-type]
        require_finite([(leaf, leaf.grad) for leaf, _ in before if leaf.grad is not None], tasks)
    except BaseException:
        for leaf, gradient in before:
            leaf.grad = gradient
        raise
    for leaf, gradient in before:
        if gradient is not None:
            new, leaf.grad = leaf.grad, gradient
            if new is not None:
                leaf.grad = gradient_sum(gradient, new) if gradient.is_sparse else gradient.add_(new)
