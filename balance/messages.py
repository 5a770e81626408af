"""Warnings that point at the line of the user's code."""

from __future__ import annotations

import sys
import warnings

_INSIDE = ("balance", "torch", "contextlib")  # packages between the user's call and the cause of a warning


def warn_caller(message: str) -> None:
    """Warn, with the first line outside of this library and of torch as the place, however deep the call is."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
