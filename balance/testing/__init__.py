"""Properties of rules, for authors of new rules: the checks that all rules of this library pass. Needs hypothesis.

    from balance.testing import check_gradient_balancer
    check_gradient_balancer(lambda num_tasks: my_rule, claims=("conflict_free",))

A factory builds a fresh rule for K tasks; a rule that draws must start from one seed each time. A claim that fails raises an
AssertionError with the simplest counter-example.
"""

from importlib.util import find_spec

from ..messages import require_package

if find_spec("hypothesis") is None:
    require_package("hypothesis", "testing")

from .gradient_claims import GRADIENT_CLAIMS, WEIGHT_CLAIMS, RuleUnderTest, check_gradient_balancer
from .inputs import KINDS, make_jacobian, make_losses
from .loss_claims import LOSS_CLAIMS, check_loss_balancer, derivatives

# Claims about scaling, order and rotation, which a rule lists in its registration
INVARIANCES = frozenset(
    {
        "permutation_equivariant",
        "rotation_equivariant",
        "unchanged_by_scaling_one_task",
        "scales_with_the_gradients",
        "linear_under_scaling",
        "loss_permutation_equivariant",
        "gradient_unchanged_by_scaling_a_loss",
        "separable",
    }
)

__all__ = [
    "GRADIENT_CLAIMS",
    "INVARIANCES",
    "KINDS",
    "LOSS_CLAIMS",
    "WEIGHT_CLAIMS",
    "RuleUnderTest",
    "check_gradient_balancer",
    "check_loss_balancer",
    "derivatives",
    "make_jacobian",
    "make_losses",
]
