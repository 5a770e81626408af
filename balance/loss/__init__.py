"""Loss balancers: losses (K,) -> weighted losses (K,). Importing this package registers them."""

from balance.loss import dwa, famo, fixed, groups, improvable_gap, scale, uncertainty

__all__ = ["dwa", "famo", "fixed", "groups", "improvable_gap", "scale", "uncertainty"]
