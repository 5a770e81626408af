"""Claims of `balance.testing` that each rule satisfies: one row per registered name, one entry per claim.

An entry is True if hypothesis proves the claim, on degenerate input too. It is GENERIC if the claim is true for linearly
independent gradients. Otherwise it is a counter-example, an input on which the claim is checked to fail. So every rule meets
every claim, and folklore that is false stays refuted.
"""

from tests.claims.gradient import GENERIC, GRADIENT_OPTIONS, GRADIENT_ROWS, gradient_factory
from tests.claims.loss import LOSS_OPTIONS, LOSS_ROWS, loss_factory

__all__ = ["GENERIC", "GRADIENT_OPTIONS", "GRADIENT_ROWS", "LOSS_OPTIONS", "LOSS_ROWS", "gradient_factory", "loss_factory"]
