"""Records of benchmarks, one JSON file for each run."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent


def write(results: dict[str, Any], kind: str, folder: Path, threads: int | str = 1) -> Path:
    """Write results to ``<date>_<kind>_<machine>_<commit>.json``, with the versions that they depend on.

    Args:
        results: Rows by title.
        kind: Name of the benchmark.
        folder: Created if necessary.
        threads: Number of threads, or several numbers in words.

    Returns:
        Path of the file.
    """
    words = ["git", "-C", str(FOLDER), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or "unknown"  # noqa: S603
    versions = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit, "threads": threads}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{datetime.now(tz=timezone.utc):%Y-%m-%d}_{kind}_{platform.machine()}_{commit}.json"
    file.write_text(json.dumps(versions | {"results": results}, indent=1) + "\n", encoding="utf-8")
    print(f"\nWritten to {file.name} in {folder.name}")
    return file
