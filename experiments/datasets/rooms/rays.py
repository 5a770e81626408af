"""First hits of the rays of a pinhole camera with a scene."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from experiments.datasets.rooms.room import Array, Box, Camera, Scene, Sphere

FIELD_OF_VIEW = np.pi / 3  # horizontal


class Hits(NamedTuple):
    """The nearest surface along each of P rays."""

    depth: Array  # (P,), along the axis of the camera, in metres
    normal: Array  # (P, 3), of unit length, towards the side of the camera, in the world frame
    surface: NDArray[np.int64]  # (P,), in the order of `Materials`


def view(height: int, width: int) -> Array:
    """Return rays through the pixels, row by row, in the frame of the camera: x to the right, y up, z towards the viewer.

    Args:
        height: Pixels.
        width: Pixels; they cover `FIELD_OF_VIEW`.

    Returns:
        Rays of length 1 along the axis of the camera, so that their factor is a depth. Shape (P, 3).
    """
    focal = width / 2 / np.tan(FIELD_OF_VIEW / 2)  # in pixels
    y, x = np.mgrid[:height, :width] + 0.5
    return np.stack([(x - width / 2) / focal, (height / 2 - y) / focal, np.full((height, width), -1.0)], -1).reshape(-1, 3)


def around_y(angle: float) -> Array:
    """Return the rotation about the vertical axis, x towards -z. Shape (3, 3), for columns."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])


def orientation(camera: Camera) -> Array:
    """Return the rotation from the frame of the camera to the frame of the world. Shape (3, 3), for columns."""
    cos, sin = np.cos(camera.pitch), np.sin(camera.pitch)
    around_x = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    turn: Array = around_y(camera.yaw) @ around_x
    return turn


def trace(scene: Scene, rays: Array) -> Hits:
    """Return the first hits of rays (P, 3), in the world frame, from the camera, which must be outside of every object."""
    origin = scene.camera.position
    rays = np.where(rays == 0, 1e-12, rays)  # a ray that is parallel to a face meets it far away
    hits = leave_room(scene.size, origin, rays)
    for surface, box in enumerate(scene.boxes, start=3):
        enter_box(box, surface, origin, rays, hits)
    for surface, sphere in enumerate(scene.spheres, start=3 + len(scene.boxes)):
        enter_sphere(sphere, surface, origin, rays, hits)
    return hits


def leave_room(size: Array, origin: Array, rays: Array) -> Hits:
    """Return the hits with the six faces of the room from inside."""
    leave = (np.where(rays > 0, size, 0) - origin) / rays
    axis = leave.argmin(1)
    every = np.arange(len(rays))
    down = rays[every, axis] < 0
    normal = np.zeros_like(rays)
    normal[every, axis] = np.where(down, 1, -1)
    return Hits(leave[every, axis], normal, np.where(axis == 1, np.where(down, 0, 1), 2))


def enter_box(box: Box, surface: int, origin: Array, rays: Array, hits: Hits) -> None:
    """Update the hits where a box is nearer, by the slab method in the frame of the box."""
    turn = around_y(box.yaw)
    inverse = 1 / (rays @ turn)
    middle = (box.centre - origin) @ turn * inverse
    reach = box.half * np.abs(inverse)
    enter = middle - reach
    near = enter.max(1)
    hit = np.flatnonzero((near < (middle + reach).min(1)) & (near > 0) & (near < hits.depth))
    axis = enter[hit].argmax(1)
    normal = np.zeros((len(hit), 3))
    normal[np.arange(len(hit)), axis] = -np.sign(inverse[hit, axis])
    hits.depth[hit] = near[hit]
    hits.normal[hit] = normal @ turn.T
    hits.surface[hit] = surface


def enter_sphere(sphere: Sphere, surface: int, origin: Array, rays: Array, hits: Hits) -> None:
    """Update the hits where a sphere is nearer."""
    away = origin - sphere.centre
    square, linear = (rays**2).sum(1), rays @ away
    discriminant = linear**2 - square * (away @ away - sphere.radius**2)
    near = (-linear - np.sqrt(np.maximum(discriminant, 0))) / square
    hit = np.flatnonzero((discriminant > 0) & (near > 0) & (near < hits.depth))
    hits.depth[hit] = near[hit]
    hits.normal[hit] = (away + near[hit, None] * rays[hit]) / sphere.radius
    hits.surface[hit] = surface
