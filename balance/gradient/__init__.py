"""Gradient balancers: Gramian (K, K) -> weights (K,). Importing this package registers them."""

from balance.gradient import bargaining, dual_cone, elementwise, equal_angle, min_norm, projection

__all__ = ["bargaining", "dual_cone", "elementwise", "equal_angle", "min_norm", "projection"]
