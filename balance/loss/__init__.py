"""Loss balancers: losses (K,) -> weighted losses (K,). Importing this package registers them."""

from balance.loss import fixed, groups, rate, scale, uncertainty
from balance.loss import improvable_gap as gap

__all__ = ["fixed", "gap", "groups", "rate", "scale", "uncertainty"]
