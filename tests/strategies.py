"""Losses, Jacobians and Gramians for hypothesis: K and the kind are drawn and shrink; the numbers come from a drawn seed."""

from hypothesis import strategies as st

from balance.testing import KINDS, make_jacobian, make_losses

SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def jacobians(draw, min_tasks=1, max_tasks=8, kinds=KINDS):
    return make_jacobian(draw(st.integers(min_tasks, max_tasks)), draw(st.sampled_from(kinds)), draw(SEEDS))


@st.composite
def losses(draw, min_tasks=1, max_tasks=8, steps=None):
    """Positive losses. Shape (K,), or (steps, K)."""
    sequence = make_losses(steps or 1, draw(st.integers(min_tasks, max_tasks)), draw(SEEDS))
    return sequence[0] if steps is None else sequence
