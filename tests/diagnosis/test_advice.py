"""The pair of methods that a diagnosis advises, and its reason."""

import json

import pytest

from balance import gradient_balancers, loss_balancers
from balance.diagnosis.advice import BALANCED, CALLING, MANY_TASKS, UNBALANCED, advise, choose_pair
from balance.diagnosis.findings import Finding
from balance.types import Remedy
from tests.diagnosis.problems import Quadratics, Scaled, diagnose


@pytest.mark.parametrize("pair", [BALANCED, UNBALANCED])
def test_advised_methods_are_registered_and_need_nothing_of_the_loop(pair):
    loss, gradient = pair
    assert loss_balancers.traits(loss).needs == ()
    assert gradient is None or gradient_balancers.traits(gradient).needs == ()


def test_a_task_that_drowns_another_calls_for_a_balancer_and_the_findings_are_the_reason():
    advice = diagnose(Scaled(small=[0.0, 1], large=[5.0, 0]), lr=1e-4).advice
    assert advice[:2] == UNBALANCED
    assert "The gradient of 'large' is 5000 times as long" in advice.reason
    assert advice.reason.endswith(".")


def test_gradients_of_similar_length_call_for_equal_weights():
    advice = diagnose(Quadratics(a=[1.0, 0], b=[0.0, 1]), lr=1e-4).advice
    assert advice[:2] == BALANCED
    assert "no task dominates" in advice.reason


def test_conflict_alone_is_no_reason_for_a_balancer():
    diagnosis = diagnose(Quadratics(a=[1.0, 0.5], b=[-1.0, 0.5]))
    assert "conflict at nearly every batch" in " ".join(diagnosis.recommendation)
    assert diagnosis.advice[:2] == BALANCED


@pytest.mark.parametrize("problem", Remedy.__args__)
@pytest.mark.parametrize("num_tasks", [2, MANY_TASKS - 1, MANY_TASKS, 100])
def test_rule(problem, num_tasks):
    expected = UNBALANCED if problem in CALLING and num_tasks < MANY_TASKS else BALANCED
    assert choose_pair({problem}, num_tasks) == expected
    assert advise([Finding(problem, "Text")], num_tasks)[:2] == expected
    assert advise([Finding(problem, "Text", present=False)], num_tasks)[:2] == BALANCED


def test_many_tasks_are_named_as_the_reason():
    assert "With 40 tasks, a gradient balancer needs 40 backward passes" in advise([Finding("loss scale", "Text")], 40).reason


def test_advice_is_part_of_the_report_and_of_the_record():
    diagnosis = diagnose(Quadratics(a=[1.0, 0], b=[0.0, 1]), lr=1e-4)
    assert "1. Begin with loss='ls', gradient=None." in str(diagnosis)
    numbers = json.loads(json.dumps(diagnosis.as_dict()))
    assert numbers["advice"] == {"loss_method": "ls", "gradient_method": None, "reason": diagnosis.advice.reason}
