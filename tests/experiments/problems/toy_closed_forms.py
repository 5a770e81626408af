"""Seven methods for two losses in closed form, on many points of the plane at once: an oracle for the stage.

Every rule returns the weights of the raw gradients, and agrees with the stage to rounding. Paths part where rounding decides:
Nash-MTL on the ridge a = 0, and any method that oscillates about the front.
"""

import math

import numpy as np

from experiments.problems.toy.landscape import LOWER_BOUND, SCALE

STATIONARY = 1e-12  # as in balance.solvers
FLOOR = 5e-6  # least argument of the logarithms


def values_and_gradients(points, scale=SCALE):
    """Return the two losses and their gradients at many points, without autograd.

    Args:
        points: a and b. Shape (2, S).
        scale: Scale of the first loss.

    Returns:
        Losses (2, S) by task, and gradients (2, 2, S) by task and coordinate.
    """
    a, b = points
    half, whole = np.tanh(0.5 * b), np.tanh(b)
    gates = np.maximum([half, -half], 0)  # (2, S): of the logarithms and of the bowls
    slope = 0.5 * (1 - half * half)
    gate_slopes = np.array([slope * (b >= 0), -slope * (b <= 0)])
    inside = np.array([-0.5 * (a + 7) + whole, -0.5 * (a - 7) - whole])  # of f1 and f2
    size = np.abs(inside)
    logs = np.log(np.maximum(size, FLOOR)) + 6
    away = np.array([a - 7, a + 7])  # from the middles of the bowls
    down = b + 8
    bowls = 0.1 * away * away + (0.01 * down * down - 20)
    inverse = np.divide(1, inside, out=np.zeros_like(inside), where=size >= FLOOR)
    tilt = 1 - whole * whole
    factors = np.array([[scale], [1.0]])
    values = factors * (logs * gates[0] + bowls * gates[1])
    gradients = np.empty((2, 2, points.shape[1]))
    gradients[:, 0] = factors * (-0.5 * inverse * gates[0] + 0.2 * away * gates[1])
    signs = np.array([[1.0], [-1.0]])
    gradients[:, 1] = factors * (
        signs * tilt * inverse * gates[0] + logs * gate_slopes[0] + 0.02 * down * gates[1] + bowls * gate_slopes[1]
    )
    return values, gradients


class Adam:
    """`torch.optim.Adam`, without decay."""

    def __init__(self, shape, lr, beta2=0.999):
        self.lr, self.beta2, self.steps = lr, beta2, 0
        self.mean, self.square = np.zeros(shape), np.zeros(shape)

    def update(self, gradient):
        """Return the step to subtract."""
        self.steps += 1
        self.mean += (1 - 0.9) * (gradient - self.mean)
        self.square *= self.beta2
        self.square += (1 - self.beta2) * gradient * gradient
        root = math.sqrt(1 - self.beta2**self.steps)
        return self.mean * (self.lr / (1 - 0.9**self.steps)) / (np.sqrt(self.square) / root + 1e-8)


# Rules: losses above their lower bounds (2, S), and entries g11, g12, g22 of S Gramians, to weights of the gradients (2, S)


def ls():
    """Weight all gradients with one."""
    return lambda losses, _: np.ones_like(losses)


def mgda():
    """Weight the gradients by the point of the segment between them that is nearest to the origin."""
    return lambda _, gramian: _split(_nearest(*gramian))


def pcgrad():
    """Project each gradient off the other; for two tasks the order does not matter."""

    def weights(losses, gramian):
        g11, g12, g22 = gramian
        conflict = (g12 < 0) & (g11 > 0) & (g22 > 0)
        squares = np.array([g11, g22])
        return 1 - np.divide(np.minimum(g12, 0), squares, out=np.zeros_like(losses), where=conflict)

    return weights


def cagrad(c=0.4):
    r"""Solve the dual problem along the segment between the gradients.

    Let :math:`v(t) = g_2 + t (g_1 - g_2)` and :math:`r = c \lVert g_0 \rVert`. The derivative
    :math:`\langle g_0, g_1 - g_2 \rangle + r \, \langle v, g_1 - g_2 \rangle / \lVert v \rVert` vanishes at a fixed angle
    between v and the segment. So t is a fixed number of distances from the foot of the perpendicular.
    """

    def weights(_, gramian):
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
        moves = np.minimum(square, mean2) > STATIONARY * (g11 + g22) / 2  # opposite gradients are no exception
        stretch = np.where(moves, c * np.sqrt(mean2 / np.where(moves, square, 1)), 0)
        return (0.5 + stretch * _split(t)) / (1 + c * c)

    return weights


def nashmtl(max_norm=1.0):
    r"""Sum gradients of unit length, :math:`\alpha_k = 1 / (\lVert g_k \rVert \sqrt{1 + \cos})`, and shorten the sum."""

    def weights(losses, gramian):
        g11, g12, g22 = gramian
        lengths = np.sqrt([g11, g22])
        nonzero = lengths > 0
        inverse = np.divide(1, lengths, out=np.zeros_like(losses), where=nonzero)
        angle = 1 + g12 * inverse[0] * inverse[1]  # 1 where a gradient is zero: only the other task bargains
        solved = angle > 2 * STATIONARY
        norm = np.sqrt(nonzero.sum(axis=0))
        shrink = 1.0 if max_norm is None else np.minimum(1, max_norm / np.maximum(norm, 1))
        return inverse * np.where(solved, shrink / np.sqrt(np.where(solved, angle, 1)), 0)

    return weights


class Famo:
    """FAMO that learns from the losses of the next step (``next_batch=True``)."""

    def __init__(self, gamma=1e-3, lr=0.025):
        self.gamma, self.lr = gamma, lr
        self.adam = None
        self.logits = self.previous = np.zeros(0)

    def __call__(self, losses, _):
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
        return shares / shares.sum(axis=0)


class GO4Align:
    """GO4Align with two groups, which are the two tasks."""

    def __init__(self, step_size=1e-4):
        self.step_size = step_size
        self.history = 0.0

    def __call__(self, losses, _):
        self.history = self.history + losses
        return _softmax(-self.step_size * self.history) * losses.sum(axis=0) / losses


CLOSED_FORMS = {
    "ls": ls,
    "mgda": mgda,
    "pcgrad": pcgrad,
    "cagrad": cagrad,
    "nashmtl": nashmtl,
    "famo": Famo,
    "go4align": GO4Align,
}


def descend(methods, starts, steps, options, *, lr=1e-3, beta2=0.999, scale=SCALE):
    """Compute the trajectories of several methods from several starts, all at once.

    Args:
        methods: Among `CLOSED_FORMS`.
        starts: S points.
        steps: Steps of Adam.
        options: Options of the methods, by name; a method without any has the defaults of the library.
        lr: Learning rate of the points.
        beta2: Decay of Adam's mean of squared gradients.
        scale: Scale of the first loss.

    Returns:
        By method: points before every step and after the last. Shape (steps + 1, S, 2).
    """
    rules = [CLOSED_FORMS[method](**options.get(method, {})) for method in methods]
    slices = [slice(k * len(starts), (k + 1) * len(starts)) for k in range(len(methods))]
    points = np.tile(np.array(starts, dtype=float), (len(methods), 1)).T.copy()  # (2, methods * S)
    bounds = LOWER_BOUND * np.array([[scale], [1.0]])
    path = np.empty((steps + 1, *points.shape))
    path[0] = points
    adam, weights = Adam(points.shape, lr, beta2), np.empty_like(points)
    for step in range(1, steps + 1):
        losses, J = values_and_gradients(points, scale)
        losses -= bounds
        gramian = ((J[0] * J[0]).sum(axis=0), (J[0] * J[1]).sum(axis=0), (J[1] * J[1]).sum(axis=0))
        for rule, columns in zip(rules, slices, strict=True):
            weights[:, columns] = rule(losses[:, columns], tuple(entry[columns] for entry in gramian))
        points -= adam.update(weights[0] * J[0] + weights[1] * J[1])
        path[step] = points
    return {method: path[:, :, columns].transpose(0, 2, 1) for method, columns in zip(methods, slices, strict=True)}


def _nearest(g11, g12, g22):
    """Return the share of the first of two gradients in the shortest vector between them; a half where they are equal."""
    length2 = g11 - 2 * g12 + g22
    t = np.divide(g22 - g12, length2, out=np.full_like(g11, 0.5), where=length2 > 0)
    return np.clip(t, 0, 1)


def _square(t, g11, g12, g22):
    """Return the squared length of t g1 + (1 - t) g2."""
    return t * t * g11 + 2 * t * (1 - t) * g12 + (1 - t) * (1 - t) * g22


def _split(t):
    return np.array([t, 1 - t])


def _softmax(logits):
    shifted = np.exp(logits - logits.max(axis=0))
    return shifted / shifted.sum(axis=0)
