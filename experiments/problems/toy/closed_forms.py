"""Seven methods for two losses in closed form, on many points of the plane at once; the oracle is the stage itself.

A step through `balance.Balancer` and autograd costs milliseconds, whatever the size of the problem. Here one step of all seven
methods from all five starts costs a fraction of one. Every rule gives the weights of the *raw* gradients, and agrees with the
stage to rounding; where rounding decides (Nash-MTL on the ridge a = 0, any method swinging about the front) paths part.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from balance.messages import unknown
from experiments.problems.toy.landscape import LOWER_BOUND, SCALE, Array, values_and_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Gram: TypeAlias = tuple[Array, Array, Array]  # entries g11, g12, g22 of S Gramians, (S,) each

_STATIONARY = 1e-12  # as in balance.solvers.linear_algebra


class Rule(Protocol):
    """Losses above their lower bounds (2, S) and Gramians -> weights of the gradients (2, S)."""

    def __call__(self, losses: Array, gramian: Gram, /) -> Array: ...  # noqa: D102


class Adam:
    """`torch.optim.Adam`, without decay."""

    def __init__(self, shape: tuple[int, ...], lr: float) -> None:
        self.lr, self.steps = lr, 0
        self.mean, self.square = np.zeros(shape), np.zeros(shape)

    def update(self, gradient: Array) -> Array:
        """What is to be subtracted."""
        self.steps += 1
        self.mean += (1 - 0.9) * (gradient - self.mean)
        self.square *= 0.999
        self.square += (1 - 0.999) * gradient * gradient
        root = math.sqrt(1 - 0.999**self.steps)
        moved: Array = self.mean * (self.lr / (1 - 0.9**self.steps)) / (np.sqrt(self.square) / root + 1e-8)
        return moved


def ls() -> Rule:
    """The sum."""
    return lambda losses, _: np.ones_like(losses)


def mgda() -> Rule:
    """The shortest vector between the gradients: where the segment is nearest to the origin."""

    def weights(_: Array, gramian: Gram) -> Array:
        return _split(_nearest(*gramian))

    return weights


def pcgrad() -> Rule:
    """Each gradient off the other: for two tasks the order does not matter."""

    def weights(losses: Array, gramian: Gram) -> Array:
        g11, g12, g22 = gramian
        conflict = (g12 < 0) & (g11 > 0) & (g22 > 0)
        squares = np.array([g11, g22])
        found: Array = 1 - np.divide(np.minimum(g12, 0), squares, out=np.zeros_like(losses), where=conflict)
        return found

    return weights


def cagrad(c: float = 0.4) -> Rule:
    r"""The dual problem along the segment between the gradients.

    With :math:`v(t) = g_2 + t (g_1 - g_2)` and :math:`r = c \lVert g_0 \rVert`, its derivative
    :math:`\langle g_0, g_1 - g_2 \rangle + r \, \langle v, g_1 - g_2 \rangle / \lVert v \rVert` vanishes at a fixed angle
    between v and the segment, so t is a fixed number of distances from the foot of the perpendicular.
    """

    def weights(_: Array, gramian: Gram) -> Array:
        g11, g12, g22 = gramian
        length2 = g11 - 2 * g12 + g22  # of the segment
        mean2 = np.maximum(g11 + 2 * g12 + g22, 0) / 4
        drop = (g11 - g22) / 2  # inner product of the mean gradient with the segment
        rest = np.maximum(c * c * mean2 * length2 - drop * drop, 0)
        height2 = np.maximum(g11 * g22 - g12 * g12, 0)  # squared distance from the origin, times length2
        with np.errstate(divide="ignore", invalid="ignore"):
            t = ((g22 - g12) - drop * np.sqrt(height2 / rest)) / length2
        t = np.where(rest > 0, t, drop < 0)
        t = np.clip(np.where(length2 > 0, t, 0.5), 0, 1)
        square = _square(t, *gramian)
        moves = np.minimum(square, mean2) > _STATIONARY * (g11 + g22) / 2  # opposite gradients are no exception
        stretch = np.where(moves, c * np.sqrt(mean2 / np.where(moves, square, 1)), 0)
        found: Array = (0.5 + stretch * _split(t)) / (1 + c * c)
        return found

    return weights


def nashmtl(max_norm: float | None = 1.0) -> Rule:
    r"""Gradients of unit length, summed: :math:`\alpha_k = 1 / (\lVert g_k \rVert \sqrt{1 + \cos})`, then shortened."""

    def weights(losses: Array, gramian: Gram) -> Array:
        g11, g12, g22 = gramian
        lengths = np.sqrt([g11, g22])
        there = lengths > 0
        inverse = np.divide(1, lengths, out=np.zeros_like(losses), where=there)
        angle = 1 + g12 * inverse[0] * inverse[1]  # 1 where a gradient is zero: the other bargains alone
        solved = angle > 2 * _STATIONARY
        norm = np.sqrt(there.sum(axis=0))
        shrink = 1.0 if max_norm is None else np.minimum(1, max_norm / np.maximum(norm, 1))
        found: Array = inverse * np.where(solved, shrink / np.sqrt(np.where(solved, angle, 1)), 0)
        return found

    return weights


class Famo:
    """FAMO that learns from the losses of the next step (``next_batch=True``)."""

    def __init__(self, gamma: float = 1e-3, lr: float = 0.025) -> None:
        self.gamma, self.lr = gamma, lr
        self.adam: Adam | None = None
        self.logits = self.previous = np.zeros(0)

    def __call__(self, losses: Array, _: Gram, /) -> Array:
        """Weights of the raw losses, which sum to one."""
        distance = losses + 1e-8
        if self.adam is None:
            self.adam, self.logits = Adam(losses.shape, self.lr), np.zeros_like(losses)
        else:
            delta = np.log(self.previous) - np.log(distance)
            z = _softmax(self.logits)
            gradient = z * (delta - (z * delta).sum(axis=0)) + self.gamma * self.logits
            self.logits = self.logits - self.adam.update(gradient)
        self.previous = distance
        shares = _softmax(self.logits) / distance
        found: Array = shares / shares.sum(axis=0)
        return found


class GO4Align:
    """GO4Align with two groups, which are the two tasks."""

    def __init__(self, step_size: float = 1e-4) -> None:
        self.step_size = step_size
        self.history: Array | float = 0.0

    def __call__(self, losses: Array, _: Gram, /) -> Array:
        """Weights of the raw losses."""
        self.history = self.history + losses
        found: Array = _softmax(-self.step_size * self.history) * losses.sum(axis=0) / losses
        return found


CLOSED_FORMS: Mapping[str, Callable[..., Rule]] = {
    "ls": ls,
    "mgda": mgda,
    "pcgrad": pcgrad,
    "cagrad": cagrad,
    "nashmtl": nashmtl,
    "famo": Famo,
    "go4align": GO4Align,
}


def has(method: str, options: Mapping[str, Any]) -> bool:
    """Whether there is a closed form of a method with these options."""
    return method in CLOSED_FORMS and set(options) <= set(inspect.signature(CLOSED_FORMS[method]).parameters)


def descend(
    methods: Sequence[str],
    starts: Sequence[tuple[float, float]],
    steps: int,
    options: Mapping[str, Mapping[str, Any]],
    *,
    lr: float = 1e-3,
    scale: float = SCALE,
    advance: Callable[[int], object] = lambda _: None,
) -> dict[str, Array]:
    """Trajectories of several methods from several starts, all at once.

    Args:
        methods: Among `CLOSED_FORMS`.
        starts: S points.
        steps: Of Adam.
        options: Of the methods, by name; a method without any has the defaults of the library.
        lr: Learning rate of the points.
        scale: Of the first loss.
        advance: Is told, every now and then, how many steps were done since.

    Returns:
        By method: points before every step and after the last. Shape (steps + 1, S, 2).

    Raises:
        ValueError: If a method has no closed form.
    """
    for method in methods:
        if method not in CLOSED_FORMS:
            raise ValueError(unknown("closed form", method, CLOSED_FORMS))
    rules = [CLOSED_FORMS[method](**options.get(method, {})) for method in methods]
    slices = [slice(k * len(starts), (k + 1) * len(starts)) for k in range(len(methods))]
    points = np.tile(np.array(starts, dtype=float), (len(methods), 1)).T.copy()  # (2, methods * S)
    bounds = LOWER_BOUND * np.array([[scale], [1.0]])
    path = np.empty((steps + 1, *points.shape))
    path[0] = points
    adam, weights = Adam(points.shape, lr), np.empty_like(points)
    for step in range(1, steps + 1):
        losses, J = values_and_gradients(points, scale)
        losses -= bounds
        gramian = ((J[0] * J[0]).sum(axis=0), (J[0] * J[1]).sum(axis=0), (J[1] * J[1]).sum(axis=0))
        for rule, own in zip(rules, slices, strict=True):
            g11, g12, g22 = gramian
            weights[:, own] = rule(losses[:, own], (g11[own], g12[own], g22[own]))
        points -= adam.update(weights[0] * J[0] + weights[1] * J[1])
        path[step] = points
        if step % 500 == 0 or step == steps:
            advance(step - (step - 1) // 500 * 500)
    return {method: path[:, :, own].transpose(0, 2, 1) for method, own in zip(methods, slices, strict=True)}


def _nearest(g11: Array, g12: Array, g22: Array) -> Array:
    """Share of the first of two gradients in the shortest vector between them; a half where they are equal."""
    length2 = g11 - 2 * g12 + g22
    t: Array = np.divide(g22 - g12, length2, out=np.full_like(g11, 0.5), where=length2 > 0)
    return np.clip(t, 0, 1)


def _square(t: Array, g11: Array, g12: Array, g22: Array) -> Array:
    """Squared length of t g1 + (1 - t) g2."""
    return t * t * g11 + 2 * t * (1 - t) * g12 + (1 - t) * (1 - t) * g22


def _split(t: Array) -> Array:
    return np.array([t, 1 - t])


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=0))
    normalised: Array = shifted / shifted.sum(axis=0)
    return normalised
