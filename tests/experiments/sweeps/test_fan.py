import pytest

from experiments.sweeps.fan import configurations, overrides_of, preference, shares

TASKS = ("a", "b", "c")


def test_shares_are_even_symmetric_and_inside():
    assert shares(4) == [0.125, 0.375, 0.625, 0.875]
    with pytest.raises(ValueError, match="at least 2"):
        shares(1)


def test_preferences_sum_to_one_and_leave_other_tasks_alone():
    assert preference(0.25, ("a", "b"), TASKS) == pytest.approx([1 / 6, 1 / 2, 1 / 3], abs=1e-6)
    assert preference(0.25, ("b", "a"), ("a", "b")) == [0.75, 0.25]


@pytest.mark.parametrize(("pair", "message"), [(("a", "d"), "Unknown task"), (("a", "a"), "two different tasks")])
def test_wrong_pairs_are_refused(pair, message):
    with pytest.raises(ValueError, match=message):
        preference(0.5, pair, TASKS)


def test_a_preference_is_an_option_of_the_method_or_a_priority():
    values = [0.2, 0.3, 0.5]
    assert overrides_of("ls", "none", values, TASKS) == tuple(
        f"balancer.weights.{task}={3 * value:g}" for task, value in zip(TASKS, values, strict=True)
    )
    assert overrides_of("pbi", "none", values, TASKS) == ("loss.preference=[0.2,0.3,0.5]",)
    assert overrides_of("scaleinvls+pbi", "mgda", values, TASKS) == ("loss.pbi.preference=[0.2,0.3,0.5]",)


def test_every_method_gets_every_share():
    made = configurations(["ls", "pbi"], ["none", "mgda"], 3, ("a", "b"), TASKS)
    assert len(made) == 12
    assert len({configuration.name for configuration, _ in made}) == 12
    assert {share for _, share in made} == set(shares(3))
