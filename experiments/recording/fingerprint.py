"""Entries of a configuration that decide the result of a run, and a hash of them."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from balance.comparison.recorded_run import METHOD_GROUPS
from balance.comparison.store import EARLIER, SEPARATE, decides, earlier_options
from balance.config import flatten

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from omegaconf import DictConfig

    from balance.comparison.recorded_run import Settings


def deciding(config: DictConfig) -> dict[str, Any]:
    """Return the entries of a configuration that decide the result of a run, by dotted key."""
    settings = flatten(config)
    return {key: value for key, value in settings.items() if decides(key, settings)}


def settings_of(config: DictConfig) -> dict[str, str]:
    """Return `RecordedRun.settings` of the run that a configuration describes."""
    return {key: str(value) for key, value in deciding(config).items() if key not in SEPARATE}


def common_of(config: DictConfig) -> Settings:
    """Return `RecordedRun.common` of the run that a configuration describes."""
    return tuple(sorted((key, value) for key, value in settings_of(config).items() if not key.startswith(METHOD_GROUPS)))


def fingerprint(config: DictConfig) -> str:
    """Return a short hash, which is equal for two configurations if and only if they describe equal runs.

    Entries with the values of earlier runs are left out, so that earlier hashes stay valid.
    """
    entries = deciding(config)
    earlier = {**EARLIER, **earlier_options(config.loss_method)}
    return digest({key: value for key, value in entries.items() if earlier.get(key, ()) != value})


def digest(content: Mapping[str, Any] | Sequence[Any]) -> str:
    """Return a short hash of content that JSON can represent."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
