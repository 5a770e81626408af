"""Gradient balancers: Gramian (K, K) -> weights (K,). Importing this package registers them."""

from balance.gradient import (
    averaged,
    bargaining,
    elementwise,
    equal_angle,
    excess,
    magnitudes,
    min_norm,
    physics,
    preference,
    primary,
    projection,
    several_batches,
)

__all__ = [
    "averaged",
    "bargaining",
    "elementwise",
    "equal_angle",
    "excess",
    "magnitudes",
    "min_norm",
    "physics",
    "preference",
    "primary",
    "projection",
    "several_batches",
]
