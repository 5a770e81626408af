"""Procedural indoor scenes with labels, depth and surface normals, in the layouts of NYUv2 and CityScapes.

Furnished rooms, ray-cast with NumPy; every scene is a function of its seed. With them the problems on images run through the
loaders of the real data sets where these cannot be downloaded. Numbers on them say nothing about NYUv2 or CityScapes. Never
print them next to published ones.

    python -m experiments.datasets.rooms --output FOLDER [--layout cityscapes]
"""

from experiments.datasets.rooms.rendering import Sample, render
from experiments.datasets.rooms.room import CLASSES, Scene, draw
from experiments.datasets.rooms.storage import MERGED, arrays, cached, seeds, write

__all__ = ["CLASSES", "MERGED", "Sample", "Scene", "arrays", "cached", "draw", "render", "seeds", "write"]
