"""Figure of the newest record of steps: time over the number of tasks, by network."""

import json
import sys
from pathlib import Path

ROOT = Path(sys.argv[0]).resolve().parents[2]  # Sphinx gives the script as the first argument
sys.path.insert(0, str(ROOT / "benchmarks"))

from show import figure_of_steps  # noqa: E402 - a module of the benchmarks

newest = max((ROOT / "benchmarks/results").glob("*_jacobian_*.json"))
figure_of_steps(json.loads(newest.read_text(encoding="utf-8"))["results"])
