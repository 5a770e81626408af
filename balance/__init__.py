"""Any loss balancer with any gradient balancer, for multi-task learning.

losses (K,) -> loss balancer -> weighted losses (K,) -> Jacobian (K, P) or Gramian (K, K)
            -> gradient balancer -> weights (K,) -> direction (P,) -> .grad
"""

from balance import compose, gradient, loss
from balance._version import __version__
from balance.balancer import Balancer
from balance.diagnosis import Diagnosis, diagnose
from balance.registry import gradient_balancers, loss_balancers
from balance.report import Report
from balance.splitter import Splitter

__all__ = [
    "Balancer",
    "Diagnosis",
    "Report",
    "Splitter",
    "__version__",
    "compose",
    "diagnose",
    "gradient",
    "gradient_balancers",
    "loss",
    "loss_balancers",
]
