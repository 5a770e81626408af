import os

import pytest
import torch

from balance import gradient_balancers, loss_balancers, testing
from tests import claims

EXAMPLES = {"thorough": 1000, "mutation": 15}.get(os.environ.get("HYPOTHESIS_PROFILE", ""), 15)


def test_every_loss_balancer_answers_every_claim():
    assert set(claims.LOSS_ROWS) == set(loss_balancers.names())
    for name, row in claims.LOSS_ROWS.items():
        assert set(row) == set(testing.LOSS_CLAIMS), name


def test_every_gradient_balancer_answers_every_claim():
    assert set(claims.GRADIENT_ROWS) == set(gradient_balancers.names())
    for name, row in claims.GRADIENT_ROWS.items():
        on_weights = set(testing.WEIGHT_CLAIMS) if gradient_balancers.sees(name) == "jacobian" else set()
        assert set(row) == set(testing.GRADIENT_CLAIMS) - on_weights, name


@pytest.mark.parametrize(
    ("registry", "name", "row"),
    [(gradient_balancers, *item) for item in claims.GRADIENT_ROWS.items()]
    + [(loss_balancers, *item) for item in claims.LOSS_ROWS.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_registered_invariances_are_exactly_the_proved_claims(registry, name, row):
    proved = {claim for claim, entry in row.items() if entry is True or entry == claims.GENERIC}
    assert set(registry.traits(name).invariances) == proved & testing.INVARIANCES


@pytest.mark.parametrize("registry", [gradient_balancers, loss_balancers], ids=lambda registry: registry.kind)
def test_every_method_has_a_label_and_all_but_the_baselines_have_a_paper(registry):
    traits = {name: registry.traits(name) for name in registry.names()}
    labels = [entry.label for entry in traits.values()]
    assert len(set(labels)) == len(labels)
    assert all(labels)
    baselines = {"ls", "stl", "constant", "linear_schedule", "mean", "sum"}
    assert {name for name, entry in traits.items() if not entry.paper} <= baselines
    assert all("https://" in entry.paper for name, entry in traits.items() if name not in baselines)


def cases(rows, proved):
    return [
        pytest.param(name, claim, entry, id=f"{name}-{claim}")
        for name, row in rows.items()
        for claim, entry in row.items()
        if (entry is True or entry == claims.GENERIC) == proved
    ]


@pytest.mark.parametrize(("name", "claim", "entry"), cases(claims.GRADIENT_ROWS, proved=True))
def test_gradient_claim_holds(name, claim, entry):
    testing.check_gradient_balancer(
        claims.gradient_factory(name),
        (claim,),
        sees=gradient_balancers.sees(name),
        kinds=testing.KINDS if entry is True else ("generic",),
        examples=EXAMPLES,
    )


@pytest.mark.parametrize(("name", "options", "proved"), claims.GRADIENT_OPTIONS, ids=str)
def test_gradient_claims_hold_with_options(name, options, proved):
    factory, sees = claims.gradient_factory(name, **options), gradient_balancers.sees(name)
    testing.check_gradient_balancer(factory, proved, sees=sees, examples=EXAMPLES)


@pytest.mark.parametrize(("name", "claim", "entry"), cases(claims.GRADIENT_ROWS, proved=False))
def test_gradient_claim_fails_on_its_counterexample(name, claim, entry):
    rule = testing.RuleUnderTest(claims.gradient_factory(name), gradient_balancers.sees(name))
    with pytest.raises(AssertionError):
        testing.GRADIENT_CLAIMS[claim](rule, torch.tensor(entry, dtype=torch.float64))


@pytest.mark.parametrize(("name", "claim", "entry"), cases(claims.LOSS_ROWS, proved=True))
def test_loss_claim_holds(name, claim, entry):
    testing.check_loss_balancer(claims.loss_factory(name), (claim,), examples=EXAMPLES if name != "igbv2" else 5)


@pytest.mark.parametrize(("name", "options", "proved"), claims.LOSS_OPTIONS, ids=str)
def test_loss_claims_hold_with_options(name, options, proved):
    testing.check_loss_balancer(claims.loss_factory(name, **options), proved, examples=EXAMPLES)


@pytest.mark.parametrize(("name", "claim", "entry"), cases(claims.LOSS_ROWS, proved=False))
def test_loss_claim_fails_on_its_counterexample(name, claim, entry):
    error = ValueError if (name, claim) == ("igbv2", "absent_task_is_a_smaller_problem") else AssertionError
    with pytest.raises(error):
        testing.LOSS_CLAIMS[claim](claims.loss_factory(name), torch.tensor(entry, dtype=torch.float64))
