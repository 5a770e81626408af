"""NYUv2 and CityScapes as preprocessed for MTAN."""

import numpy as np


def write_nyuv2(folder, counts, size=(32, 48), seed=0):
    """Write random samples: image in 0..1, label -1..12, depth, unit normal.

    Args:
        folder: Folder of the data set.
        counts: Number of samples by split.
        size: (H, W).
        seed: Seed of the samples.

    Returns:
        By split, arrays (n, H, W[, channels]) by folder.
    """
    rng = np.random.default_rng(seed)
    data = {}
    for split, n in counts.items():
        normal = rng.normal(size=(n, *size, 3))
        data[split] = {
            "image": rng.random((n, *size, 3)).astype(np.float32),
            "label": rng.integers(-1, 13, (n, *size)).astype(np.float32),
            "depth": rng.uniform(0.5, 9, (n, *size, 1)).astype(np.float32),
            "normal": (normal / np.linalg.norm(normal, axis=-1, keepdims=True)).astype(np.float32),
        }
    return _write(folder, data)


def write_cityscapes(folder, counts, size=(32, 48), seed=0):
    """Write random samples: image in 0..1, label -1..6, inverse depth below 0.49; see `write_nyuv2`."""
    rng = np.random.default_rng(seed)
    data = {}
    for split, n in counts.items():
        data[split] = {
            "image": rng.random((n, *size, 3)).astype(np.float32),
            "label_7": rng.integers(-1, 7, (n, *size)).astype(np.float32),
            "depth": rng.uniform(0.01, 0.49, (n, *size, 1)).astype(np.float32),
        }
    return _write(folder, data)


def _write(folder, data):
    for split, parts in data.items():
        for name, arrays in parts.items():
            (folder / split / name).mkdir(parents=True)
            for i, array in enumerate(arrays):
                np.save(folder / split / name / f"{i}.npy", array)
    return data
