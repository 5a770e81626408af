"""MNIST in IDX files."""

import gzip
import struct

import numpy as np


def write_idx(file, magic, array):
    content = struct.pack(f">{1 + array.ndim}i", magic, *array.shape) + array.astype(np.uint8).tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def write_mnist(folder, sizes=(60, 20), ending="", size=28):
    """Write random images and labels, drawn in this order from a generator with seed 0."""
    generator = np.random.default_rng(0)
    for part, count in zip(("train", "t10k"), sizes, strict=True):
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", 2051, generator.integers(0, 256, (count, size, size)))
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", 2049, generator.integers(0, 10, count))
