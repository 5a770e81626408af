"""Image, labels, depth and normals of a scene, with invalid pixels as in NYUv2."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.datasets.rooms.rays import orientation, trace, view
from experiments.datasets.rooms.room import Scene, draw

if TYPE_CHECKING:
    from experiments.datasets.rooms.rays import Hits
    from experiments.datasets.rooms.room import Array

AMBIENT = 0.35
NOISE = 0.02  # standard deviation, on the image
BORDER = 2  # pixels without label, depth and normal
GRAZING = 0.08  # cosine between ray and normal below which depth and normal are missing
UNLABELLED = 0.01  # share of the other pixels


class Sample(NamedTuple):
    """Arrays in the format of NYUv2 on disk, all float32."""

    image: NDArray[np.float32]  # (H, W, 3), RGB in 0..1
    label: NDArray[np.float32]  # (H, W), index in CLASSES, -1 = unknown
    depth: NDArray[np.float32]  # (H, W, 1), metres along the axis of the camera, 0 = unknown
    normal: NDArray[np.float32]  # (H, W, 3), unit vectors in the frame of the camera, 0 = unknown


def render(scene: int | Scene, height: int = 72, width: int = 96, *, seed: int | None = None) -> Sample:
    """Render a scene.

    Args:
        scene: The seed of a scene, or a scene.
        height: Pixels.
        width: Pixels; they are 60 degrees.
        seed: Seed of the noise and of the missing labels; by default the seed of the scene, or 0.

    Returns:
        Arrays in which the frame of the camera is x to the right, y up, z towards the viewer.
    """
    if seed is None:
        seed = 0 if isinstance(scene, Scene) else scene
    scene = scene if isinstance(scene, Scene) else draw(scene)
    rng = np.random.default_rng([seed, 1])
    turn = orientation(scene.camera)
    rays = view(height, width) @ turn.T
    hits = trace(scene, rays)
    towards = -(hits.normal * rays).sum(1) / np.linalg.norm(rays, axis=1)
    assert towards.min() > -1e-9, "a visible surface faces the camera"
    inside = np.zeros((height, width), bool)
    inside[BORDER : height - BORDER, BORDER : width - BORDER] = True
    measured = inside.ravel() & (towards >= GRAZING)
    labelled = inside.ravel() & (rng.random(height * width) >= UNLABELLED)
    image = shade(scene, hits, rays) + NOISE * rng.standard_normal((height * width, 3))
    return Sample(
        image.clip(0, 1).astype(np.float32).reshape(height, width, 3),
        np.where(labelled, scene.labels[hits.surface], -1).astype(np.float32).reshape(height, width),
        np.where(measured, hits.depth, 0).astype(np.float32).reshape(height, width, 1),
        np.where(measured[:, None], hits.normal @ turn, 0).astype(np.float32).reshape(height, width, 3),
    )


def shade(scene: Scene, hits: Hits, rays: Array) -> Array:
    """Return the colour of each ray: texture times ambient light and one Lambertian lamp, without shadows. Shape (P, 3)."""
    points = scene.camera.position + hits.depth[:, None] * rays
    base, amplitude, wave, phase = (part[hits.surface] for part in scene.materials)
    texture = amplitude * np.sin((wave * points).sum(1) + phase)
    to_lamp = scene.lamp - points
    distance = np.linalg.norm(to_lamp, axis=1)
    light = AMBIENT + scene.power * np.maximum((hits.normal * to_lamp).sum(1), 0) / distance**3
    colour: Array = (base + texture[:, None]) * light[:, None]
    return colour
