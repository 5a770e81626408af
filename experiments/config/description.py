"""Description of a configuration for its users: value, range and role of every entry."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SYMBOLS = {"minimum": ">=", "above": ">", "maximum": "<=", "below": "<"}


class Entry(NamedTuple):
    """One entry of a configuration, in words."""

    key: str
    value: str
    range: str
    role: str


def table(config: DictConfig) -> Table:
    """Return a table of all entries of a configuration."""
    rows = Table("entry", "value", "range", "role")
    for entry in entries(config):
        rows.add_row(*map(escape, entry))  # lists have brackets, as rich's markup has
    return rows


def entries(config: DictConfig, prefix: str = "") -> Iterator[Entry]:
    """Yield the entries of a typed configuration, groups inside included.

    Args:
        config: Made from a dataclass whose entries are declared with `balance.config.setting` or with plain defaults.
        prefix: Start of every key.
    """
    schema = OmegaConf.get_type(config)
    assert schema is not None
    hints = get_type_hints(schema)
    for entry in fields(schema):
        value = None if OmegaConf.is_missing(config, entry.name) else config[entry.name]
        key = f"{prefix}{entry.name}"
        if isinstance(value, DictConfig) and is_dataclass(OmegaConf.get_type(value)):
            yield from entries(value, f"{key}.")
        else:
            yield Entry(key, text(value), range_text(hints[entry.name], entry.metadata), entry.metadata.get("help", ""))


def text(value: Any) -> str:
    """Return a value as it is written on a command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def range_text(hint: Any, metadata: Mapping[str, Any]) -> str:
    """Return the values that an entry can have: ``int >= 1``, ``sound | paper``, ``float > 0 | null``.

    Args:
        hint: Type of the entry.
        metadata: Bounds or choices of the entry, as `balance.config.setting` records them.
    """
    if "choices" in metadata:
        return " | ".join(map(str, metadata["choices"]))
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
    words = [kind_text(kind) for kind in kinds]
    bounds = " and ".join(f"{SYMBOLS[key]} {bound}" for key, bound in metadata.items() if key in SYMBOLS)
    words = [" ".join(filter(None, (*words, bounds)))] if bounds else words
    return " | ".join([*words, "null"] if kinds != [hint] else words)


def kind_text(kind: Any) -> str:
    """Return a type in words: the alternatives of a literal type, else the name of the type."""
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    return str(kind.__name__) if isinstance(kind, type) and not get_args(kind) else str(kind)
