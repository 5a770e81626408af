import copy

import pytest
import torch

from balance import loss_balancers
from tests.loss.derivatives import effective
from tests.stage.three_tasks import assert_same_state


def test_dwa_gives_equal_weights_to_equal_progress_and_more_to_slow_tasks():
    rule = loss_balancers.build("dwa", num_tasks=3)
    for means in ([2.0, 20.0, 1.0], [1.0, 10.0, 0.9]):
        rule.end_epoch(torch.tensor(means))
    weights = effective(rule, torch.ones(3, dtype=torch.float64))
    assert weights[0].item() == pytest.approx(weights[1].item())
    assert weights[2] > 1 > weights[0]


@pytest.mark.parametrize("mode", ["epoch", "window"])
def test_dwa_names_a_task_whose_older_mean_is_zero(mode):
    rule = loss_balancers.build("dwa", num_tasks=2, mode=mode, window=1)
    for means in ([1.0, 0.0], [1.0, 1.0]):
        if mode == "epoch":
            rule.end_epoch(torch.tensor(means))
            continue
        if means[1] == 0:
            rule(torch.tensor(means))
    with pytest.raises(ValueError, match=r"Mean loss of task '1' is 0, .*'dwa' divides by it"):
        rule(torch.ones(2))


@pytest.mark.parametrize("mode", ["epoch", "window"])
def test_dwa_leaves_its_state_as_before_when_a_mean_is_zero(mode):
    rule = loss_balancers.build("dwa", num_tasks=2, mode=mode, window=1)
    rule.history[:] = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    before = copy.deepcopy(rule.state_dict())
    with pytest.raises(ValueError, match="Mean loss of task '1' is 0"):
        rule(torch.ones(2))
    assert_same_state(rule.state_dict(), before)
