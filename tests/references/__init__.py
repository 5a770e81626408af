"""Fixed inputs and known numbers, a row per method. Each source is next to its number, or in the golden file's ``sources``.

The golden file contains numbers solved independently in 40 to 50 digits and compared with the official codes.
"""

import json
from pathlib import Path

import torch

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text(encoding="utf-8"))


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)
