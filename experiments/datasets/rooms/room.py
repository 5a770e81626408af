"""Random scenes: a room, a camera in it, furniture on the floor, paintings and windows on the walls, one lamp.

Lengths in metres, angles in radians. World frame: x to the right, y up, z towards the viewer, with a corner of the room at the
origin. The camera is near the wall at the greatest z and looks, at yaw 0, along -z. All classes have colours and textures of
one distribution, so that only size, shape and place distinguish them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CLASSES = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "painting", "sofa", "table", "tv", "wall", "window",
)  # fmt: skip
LABELS = {name: label for label, name in enumerate(CLASSES)}

FURNITURE = {  # width, height, depth of the boxes, before they vary by 20 %
    "bed": (1.9, 0.5, 1.5),
    "books": (0.2, 0.3, 0.2),
    "chair": (0.5, 0.9, 0.5),
    "furniture": (1.0, 1.6, 0.5),
    "sofa": (1.7, 0.8, 0.8),
    "table": (1.2, 0.75, 0.8),
    "tv": (0.9, 0.6, 0.1),
}
HANGINGS = {"painting": (0.8, 0.6), "window": (1.2, 1.1)}  # width, height, before they vary by 20 %
ON_TABLES = frozenset({"books", "objects", "tv"})  # half of them, in a room with a table

ROOM_HEIGHT = 2.6
CLEARANCE = 0.8  # between the camera and furniture, along z
HALF_THICKNESS = 0.03  # distance from the front of a painting or a window to its wall
CANDIDATES = 8  # places that are tried for an object, of which the farthest from other objects is taken


class Camera(NamedTuple):
    """A pinhole camera. Positive yaw looks to the left, positive pitch looks up."""

    position: Array  # (3,)
    yaw: float
    pitch: float


class Box(NamedTuple):
    """A box on a horizontal plane, turned about the vertical axis."""

    label: int
    centre: Array  # (3,)
    half: Array  # (3,), half of width, height and depth
    yaw: float


class Sphere(NamedTuple):
    """A ball."""

    label: int
    centre: Array  # (3,)
    radius: float


class Materials(NamedTuple):
    """Colours of S surfaces: floor, ceiling, walls, then every box, then every sphere."""

    base: Array  # (S, 3), RGB in 0..1
    amplitude: Array  # (S,), of a sine wave through space that is added to the colour
    wave: Array  # (S, 3), per metre
    phase: Array  # (S,)


@dataclass(frozen=True)
class Scene:
    """A room with its objects, camera and lamp."""

    size: Array  # (3,), width, height and depth of the room
    camera: Camera
    boxes: tuple[Box, ...]
    spheres: tuple[Sphere, ...]
    lamp: Array  # (3,)
    power: float  # of the lamp: irradiance at one metre
    materials: Materials

    @property
    def labels(self) -> NDArray[np.int64]:
        """Return the class of each surface, in the order of the materials. Shape (S,)."""
        room = [LABELS[name] for name in ("floor", "ceiling", "wall")]
        return np.array(room + [box.label for box in self.boxes] + [ball.label for ball in self.spheres], np.int64)


def draw(seed: int) -> Scene:
    """Return the scene with this seed, at least 0."""
    rng = np.random.default_rng([seed, 0])
    width, depth = rng.uniform(4, 7, 2)
    size = np.array([width, ROOM_HEIGHT, depth])
    position = np.array([width * rng.uniform(0.3, 0.7), rng.uniform(1.2, 1.7), depth - rng.uniform(0.3, 0.8)])
    camera = Camera(position, rng.uniform(-0.5, 0.5), rng.uniform(-0.25, 0.05))
    furniture, spheres = furnish(rng, size, camera)
    boxes = (*furniture, *hang(rng, size))
    lamp = size * np.array([rng.uniform(0.2, 0.8), rng.uniform(0.8, 0.95), rng.uniform(0.2, 0.8)])
    materials = draw_materials(rng, 3 + len(boxes) + len(spheres))
    return Scene(size, camera, boxes, spheres, lamp, rng.uniform(2, 4), materials)


def furnish(rng: np.random.Generator, size: Array, camera: Camera) -> tuple[tuple[Box, ...], tuple[Sphere, ...]]:
    """Draw five to nine objects on the floor or on a table, between the camera and the wall in front of it."""
    names = [str(name) for name in rng.choice([*FURNITURE, "objects"], rng.integers(5, 10))]
    boxes: list[Box] = []
    spheres: list[Sphere] = []
    taken: list[tuple[float, float, float]] = []  # x, z and radius of the objects on the floor
    for name in sorted(names, key=ON_TABLES.__contains__):  # tables come first, so that objects can be put on them
        ball = name == "objects"
        half = np.full(3, rng.uniform(0.12, 0.35)) if ball else rng.uniform(0.8, 1.2, 3) * FURNITURE[name] / 2
        yaw = rng.uniform(-np.pi, np.pi)
        tables = [box for box in boxes if box.label == LABELS["table"]]
        if name in ON_TABLES and tables and rng.random() < 0.5:
            table = tables[rng.integers(len(tables))]
            along = rng.uniform(-0.6, 0.6) * table.half[0]
            x, z = table.centre[[0, 2]] + along * np.array([np.cos(table.yaw), -np.sin(table.yaw)])
            base = 2 * table.half[1]
        else:
            radius = half[0] if ball else float(np.hypot(half[0], half[2]))
            x, z = place(rng, size, camera, radius, taken)
            taken.append((x, z, radius))
            base = 0.0
        centre = np.array([x, base + half[1], z])
        if ball:
            spheres.append(Sphere(LABELS[name], centre, half[0]))
        else:
            boxes.append(Box(LABELS[name], centre, half, yaw))
    return tuple(boxes), tuple(spheres)


def place(
    rng: np.random.Generator, size: Array, camera: Camera, radius: float, taken: list[tuple[float, float, float]]
) -> tuple[float, float]:
    """Draw the place of an object, x and z: in the room, `CLEARANCE` in front of the camera, far from other objects."""
    nearest = camera.position[2] - CLEARANCE - radius
    farthest = min(0.7 * radius, nearest)  # a corner of a large object may reach into the wall
    x = rng.uniform(0.7 * radius, size[0] - 0.7 * radius, CANDIDATES)
    z = rng.uniform(farthest, nearest, CANDIDATES)
    gaps = [np.hypot(x - other_x, z - other_z) - other_radius for other_x, other_z, other_radius in taken]
    best = int(np.argmax(np.min(gaps, axis=0))) if gaps else 0
    return float(x[best]), float(z[best])


def hang(rng: np.random.Generator, size: Array) -> list[Box]:
    """Draw one or two paintings and one or two windows, in four places that do not overlap: two in front, one on each side."""
    names = ["painting"] * rng.integers(1, 3) + ["window"] * rng.integers(1, 3)
    boxes = []
    for name, slot in zip(names, rng.permutation(4), strict=False):
        width, height = rng.uniform(0.8, 1.2, 2) * HANGINGS[name] / 2
        level = rng.uniform(1.4, 1.7)
        if slot < 2:  # the wall in front, on the left and on the right half
            centre = np.array([size[0] * (0.25 + 0.5 * slot + rng.uniform(-0.05, 0.05)), level, 0])
            half = np.array([width, height, HALF_THICKNESS])
        else:  # the far part of the wall on the left and of the one on the right
            centre = np.array([size[0] * (slot - 2), level, size[2] * rng.uniform(0.2, 0.5)])
            half = np.array([HALF_THICKNESS, height, width])
        boxes.append(Box(LABELS[name], centre, half, 0.0))
    return boxes


def draw_materials(rng: np.random.Generator, count: int) -> Materials:
    """Draw colours and textures for ``count`` surfaces."""
    return Materials(
        base=rng.uniform(0.2, 0.9, (count, 3)),
        amplitude=rng.uniform(0.02, 0.15, count),
        wave=rng.uniform(-8, 8, (count, 3)),
        phase=rng.uniform(0, 2 * np.pi, count),
    )
