"""Any loss balancer with any gradient balancer, for multi-task learning.

losses (K,) -> loss balancer -> weighted losses (K,) -> Jacobian (K, P) or Gramian (K, K)
            -> gradient balancer -> weights (K,) -> direction (P,) -> .grad
"""

from balance import compose, gradient, loss
from balance._version import __version__
from balance.balancer import Balancer
from balance.registry import gradient_balancers, loss_balancers
from balance.report import Report

__all__ = ["Balancer", "Report", "__version__", "compose", "gradient", "gradient_balancers", "loss", "loss_balancers"]
