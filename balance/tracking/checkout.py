"""The commit of the checkout that a run uses."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_tags() -> dict[str, str]:
    """Return the commit of the checkout with this file, and whether files are changed; empty outside a checkout."""
    folder = Path(__file__).parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder.parent.resolve():
            return {}  # inside the checkout of another project
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "git_dirty": str(dirty).lower()}
    except (OSError, subprocess.CalledProcessError):
        return {}
