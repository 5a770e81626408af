import pytest
import torch

from balance.testing import GRADIENT_CLAIMS, INVARIANCES, LOSS_CLAIMS, WEIGHT_CLAIMS, RuleUnderTest, check_gradient_balancer


def equal_length(gramian):
    norms = gramian.diagonal().sqrt()
    return (norms > 0) / norms.where(norms > 0, 1)


def summed(jacobian):
    return jacobian.sum(dim=0)


def test_every_claim_of_a_set_exists():
    assert set(GRADIENT_CLAIMS) | set(LOSS_CLAIMS) >= INVARIANCES
    assert set(GRADIENT_CLAIMS) > set(WEIGHT_CLAIMS)


@pytest.mark.parametrize(("name", "claim"), [*GRADIENT_CLAIMS.items(), *LOSS_CLAIMS.items()])
def test_claims_have_the_names_of_their_functions(name, claim):
    assert claim.__name__ == name


def test_check_gradient_balancer_accepts_claims_that_are_true():
    check_gradient_balancer(lambda num_tasks: equal_length, claims=("permutation_equivariant", "non_negative"), examples=20)
    check_gradient_balancer(lambda num_tasks: summed, claims=("linear_under_scaling",), sees="jacobian", examples=20)


def test_check_gradient_balancer_shows_a_counterexample():
    with pytest.raises(AssertionError, match=r"The claim 'conflict_free' fails for jacobian = \[\[.*inner products"):
        check_gradient_balancer(lambda num_tasks: equal_length, claims=("conflict_free",))


def test_check_gradient_balancer_always_checks_that_directions_are_finite():
    with pytest.raises(AssertionError, match="The claim 'finite' fails"):
        check_gradient_balancer(lambda num_tasks: lambda gramian: 1 / gramian.diagonal(), kinds=("zero_row",))


def test_check_gradient_balancer_names_an_unknown_claim():
    with pytest.raises(ValueError, match=r"Unknown claim on gradient balancers 'conflict_fre'\. Did you mean 'conflict_free'"):
        check_gradient_balancer(lambda num_tasks: equal_length, claims=("conflict_fre",), examples=1)


def test_check_gradient_balancer_refuses_claims_on_weights_of_a_rule_without_weights():
    with pytest.raises(ValueError, match="'on_simplex' is a claim on weights"):
        check_gradient_balancer(lambda num_tasks: summed, claims=("on_simplex",), sees="jacobian", examples=1)


def test_rule_under_test_builds_a_fresh_rule_for_every_call():
    calls = []
    rule = RuleUnderTest(lambda num_tasks: calls.append(num_tasks) or equal_length)
    J = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert rule.weights(J).tolist() == pytest.approx([0.2, 0.5])
    assert rule.direction(J).tolist() == pytest.approx([0.6, 1.8])
    assert calls == [2, 2]
    assert RuleUnderTest(lambda num_tasks: summed, "jacobian").direction(J).tolist() == [3, 6]
