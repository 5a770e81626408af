"""Unfinished runs: which one a configuration continues, and the lock that keeps two processes out of one folder."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from balance.comparison.store import Store
from experiments.recording.fingerprint import fingerprint
from experiments.training import ranks
from experiments.training.checkpoint_files import PREVIOUS, write_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from filelock import BaseFileLock

CONFIG, FINAL, LOCK = "config.yaml", "final.json", "run.lock"
PATIENCE = 10.0  # seconds: data workers of a killed run keep its lock until they have ended


class Unfinished(NamedTuple):
    """An unfinished run that this process has locked."""

    folder: Path
    lock: BaseFileLock
    run_id: str | None  # in MLflow; None without tracking


def lock_of(folder: Path) -> BaseFileLock:
    """Return the lock of a run's folder, which ends with the process at the latest."""
    return FileLock(folder / LOCK)


def find_unfinished(config: DictConfig) -> Unfinished | None:
    """Return the newest unfinished run with a configuration, locked; None without such a run.

    A run that another process continues at this moment does not count, nor does a tracked run that MLflow does not have.

    Args:
        config: Configuration of the run.
    """
    parent = Path(config.output_dir).expanduser().resolve() / config.experiment
    for folder in sorted((file.parent for file in parent.glob(f"*/{CONFIG}")), reverse=True):  # names begin with the time
        if not is_unfinished(folder, config):
            continue
        run_id = recorded_id(folder, config)
        lock = lock_of(folder)
        if (config.track and run_id is None) or not acquired(lock):
            continue
        if is_unfinished(folder, config):  # another process may have finished it in the meantime
            return Unfinished(folder, lock, run_id)
        lock.release()
    return None


def is_unfinished(folder: Path, config: DictConfig) -> bool:
    """Return whether a folder contains an unfinished run with a configuration, recorded in the way of the configuration."""
    if (folder / FINAL).exists():
        return False
    recorded = OmegaConf.load(folder / CONFIG)
    assert isinstance(recorded, DictConfig)
    can_resume = "resume" in recorded  # runs of earlier versions cannot
    return can_resume and recorded.track == config.track and fingerprint(recorded) == fingerprint(config)


def recorded_id(folder: Path, config: DictConfig) -> str | None:
    """Return the id of a run in MLflow; None without tracking, or if MLflow does not have the run."""
    try:
        return Store(config.experiment, config.output_dir).id_of(folder.name) if config.track else None
    except FileNotFoundError:
        return None


@contextmanager
def released(lock: BaseFileLock | None) -> Iterator[None]:
    """Release a lock on exit."""
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def finish(folder: Path, final: Mapping[str, float]) -> None:
    """Mark the run in a folder as finished, by the file of its final metrics; remove the files that only resuming needs."""
    if not ranks.is_first():
        return
    content = json.dumps(final, indent=2) + "\n"
    write_file(folder / FINAL, lambda file: file.write(content.encode()))
    for name in (PREVIOUS, LOCK):
        (folder / name).unlink(missing_ok=True)


def acquired(lock: BaseFileLock) -> bool:
    """Return whether a lock could be acquired."""
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        return False
    return True
