"""Any loss balancer with any gradient balancer, for multi-task learning.

losses (K,) -> loss balancer -> weighted losses (K,) -> Jacobian (K, P) or Gramian (K, K)
            -> gradient balancer -> weights (K,) -> direction (P,) -> .grad
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import gradient, loss
from .diagnosis.diagnose import Diagnosis, diagnose
from .messages import refuse_mixed_installation
from .rules import compose
from .rules.registry import gradient_balancers, loss_balancers
from .splitter.splitter import Splitter
from .stage.balancer import Balancer
from .stage.extra_forward import extra_forward
from .stage.report import Report

if TYPE_CHECKING:
    from .comparison.comparison import Comparison, compare  # noqa: F401

refuse_mixed_installation(Path(__file__).parent)

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
    **{name: f".{name}" for name in ("comparison", "config", "integrations", "metrics", "testing", "tracking")},
    **dict.fromkeys(("Comparison", "compare"), ".comparison.comparison"),
}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        module = import_module(_ON_FIRST_USE[name], __name__)
        return module if _ON_FIRST_USE[name] == f".{name}" else getattr(module, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ON_FIRST_USE])
