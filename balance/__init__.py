"""Any loss balancer with any gradient balancer, for multi-task learning.

losses (K,) -> loss balancer -> weighted losses (K,) -> Jacobian (K, P) or Gramian (K, K)
            -> gradient balancer -> weights (K,) -> direction (P,) -> .grad
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from balance import gradient, loss
from balance.diagnosis.diagnose import Diagnosis, diagnose
from balance.rules import compose
from balance.rules.registry import gradient_balancers, loss_balancers
from balance.splitter.splitter import Splitter
from balance.stage.balancer import Balancer
from balance.stage.extra_forward import extra_forward
from balance.stage.report import Report

if TYPE_CHECKING:
    from balance.comparison.comparison import Comparison, compare  # noqa: F401

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

# Modules, and names in modules; some need packages of an extra
_ON_FIRST_USE = {
    **{name: f"balance.{name}" for name in ("comparison", "config", "integrations", "metrics", "testing", "tracking")},
    **dict.fromkeys(("Comparison", "compare"), "balance.comparison.comparison"),
}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        module = import_module(_ON_FIRST_USE[name])
        return module if module.__name__ == f"balance.{name}" else getattr(module, name)
    raise AttributeError(f"module 'balance' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ON_FIRST_USE])
