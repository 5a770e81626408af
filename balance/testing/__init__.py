"""Properties of rules, for authors of new ones: the checks that this library's own rules pass. Needs hypothesis.

    from balance.testing import check_gradient_balancer
    check_gradient_balancer(lambda num_tasks: my_rule, claims=("conflict_free",))

A factory builds a fresh rule for K tasks; a rule that draws must start from the same seed each time. A claim that does not hold
raises an AssertionError with the simplest counter-example that was found.
"""

from balance.testing.testing import *  # noqa: F403 - split below
