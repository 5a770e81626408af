"""Any loss balancer with any gradient balancer, for multi-task learning.

losses (K,) -> loss balancer -> weighted losses (K,) -> Jacobian (K, P) or Gramian (K, K)
            -> gradient balancer -> weights (K,) -> direction (P,) -> .grad
"""

from importlib import import_module
from types import ModuleType

from balance import gradient, loss
from balance.diagnosis.diagnose import Diagnosis, diagnose
from balance.rules import compose
from balance.rules.registry import gradient_balancers, loss_balancers
from balance.splitter.splitter import Splitter
from balance.stage.balancer import Balancer
from balance.stage.extra_forward import extra_forward
from balance.stage.report import Report

__version__ = "0.1.0"

__all__ = [
    "Balancer",
    "Diagnosis",
    "Report",
    "Splitter",
    "__version__",
    "compose",
    "diagnose",
    "extra_forward",
    "gradient",
    "gradient_balancers",
    "loss",
    "loss_balancers",
]

_ON_FIRST_USE = ("config", "integrations", "metrics", "testing", "tracking")  # some need packages of an extra


def __getattr__(name: str) -> ModuleType:
    if name in _ON_FIRST_USE:
        return import_module(f"balance.{name}")
    raise AttributeError(f"module 'balance' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ON_FIRST_USE])
