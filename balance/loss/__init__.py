"""Loss balancers: losses (K,) -> weighted losses (K,). Importing this package registers them."""

from balance.loss import fixed, gap, groups, rate, scale, uncertainty

__all__ = ["fixed", "gap", "groups", "rate", "scale", "uncertainty"]
