"""Gradient balancers: Gramian (K, K) -> weights (K,). Importing this package registers them."""

from balance.gradient import (
    alignment,
    bargaining,
    conic,
    dual_cone,
    elementwise,
    equal_angle,
    fixed,
    min_norm,
    projection,
    robust,
    similarity,
)

__all__ = [
    "alignment",
    "bargaining",
    "conic",
    "dual_cone",
    "elementwise",
    "equal_angle",
    "fixed",
    "min_norm",
    "projection",
    "robust",
    "similarity",
]
