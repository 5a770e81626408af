"""Keys of YAML files, checked before omegaconf reads them, since its messages do not name the place."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from balance.messages import unknown


def check_keys(content: Any, schema: type, place: str) -> None:
    """Check that content is a dict whose keys are the fields of a dataclass.

    Args:
        content: Content of a file, or of a part of it.
        schema: The dataclass.
        place: Name of the part in messages.

    Raises:
        TypeError: If the content is no dict.
        ValueError: If a key is unknown.
    """
    if not isinstance(content, dict):
        raise TypeError(f"{place} must have keys and values, but got {content!r}")
    known = [entry.name for entry in fields(schema)]
    for key in content:
        if key not in known:
            raise ValueError(unknown(f"key of {place}", key, known))
