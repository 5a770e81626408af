"""Messages to users: warnings at the line of their code, and suggestions for names that do not exist."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_INSIDE = (__name__.partition(".")[0], "torch", "contextlib")  # packages between the user's call and the cause of a warning
_OTHER = ("sample_class.py", "weighting_methods")  # in every release of the package that weights surveys


def warn_caller(message: str) -> None:
    """Warn, with the first line outside of this library and of torch as the place, however deep the call is."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Return the message about an unknown name, with the nearest known name and all known names."""
    return f"Unknown {kind} '{name}'.{suggestion(name, known)}"


def suggestion(name: object, known: Iterable[str]) -> str:
    """Return sentences with the known name that is nearest to a wrong one, and all known names."""
    known = sorted(known)
    by_letters = {_letters(entry): entry for entry in known}  # papers write PCGrad and Nash-MTL
    near = get_close_matches(str(name), known, n=1)
    near = near or [by_letters[match] for match in get_close_matches(_letters(str(name)), by_letters, n=1)]
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{hint} Known: {', '.join(known) if known else 'none'}."


def _letters(name: str) -> str:
    """Return the letters and digits of a name, in lower case."""
    return "".join(filter(str.isalnum, name.lower()))


def require_package(package: str, extra: str) -> None:
    """Check that an optional package is installed; it is not imported.

    Args:
        package: Name under which it is imported.
        extra: Extra of this library that installs it.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{package} is required but not installed. Use pip install 'mtl-balance[{extra}]'.", name=package
        )


def refuse_mixed_installation(folder: Path) -> None:
    """Check that no other package has files in the folder of this library.

    The package ``balance`` of the Python Package Index, which weights surveys, has the same import name. Installed into one
    environment, the two overwrite each other's files.

    Args:
        folder: Folder of this library, with its ``__init__.py``.

    Raises:
        ImportError: If a file of the other package is in the folder, or if a distribution ``balance`` next to it lists
            its ``__init__.py``.
    """
    if any((folder / name).exists() for name in _OTHER) or _is_listed(folder):
        raise ImportError(
            f"{folder} must contain mtl-balance only, but the package 'balance', which weights surveys, is installed there too."
            " Run pip uninstall balance mtl-balance, and install each of them in its own environment."
        )


def _is_listed(folder: Path) -> bool:
    """Return whether an installed distribution ``balance`` lists the ``__init__.py`` of a folder."""
    records = folder.parent.glob("balance-*.dist-info/RECORD")
    return any(f"{folder.name}/__init__.py," in record.read_text(encoding="utf-8") for record in records)
