"""Gradient balancers: Gramian (K, K) -> weights (K,). Importing this package registers them."""

from balance.gradient import bargaining, elementwise, equal_angle, min_norm, projection

__all__ = ["bargaining", "elementwise", "equal_angle", "min_norm", "projection"]
