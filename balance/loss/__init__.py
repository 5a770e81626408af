"""Loss balancers: losses (K,) -> weighted losses (K,). Importing this package registers them."""

from . import (
    coba,
    dwa,
    famo,
    fixed,
    groups,
    improvable_gap,
    minimax,
    rates,
    scalarization,
    scale,
    uncertainty,
)

__all__ = [
    "coba",
    "dwa",
    "famo",
    "fixed",
    "groups",
    "improvable_gap",
    "minimax",
    "rates",
    "scalarization",
    "scale",
    "uncertainty",
]
