import pytest
import torch
from torch import nn

from balance.testing import check_loss_balancer, derivatives


class Averaged(nn.Module):
    """Weights that depend on all losses so far; the sum of them is not saved."""

    def __init__(self):
        super().__init__()
        self.total = 0.0

    def forward(self, losses):
        self.total = self.total + losses.detach().sum()
        return losses * self.total


def test_check_loss_balancer_accepts_claims_that_are_true():
    claims = ("separable", "positive_weights", "loss_permutation_equivariant", "absent_task_is_a_smaller_problem")
    check_loss_balancer(lambda num_tasks: lambda losses: losses.sqrt(), claims, examples=20)


def test_check_loss_balancer_shows_a_counterexample():
    with pytest.raises(AssertionError, match=r"The claim 'weights_sum_to_k' fails for losses = \[\["):
        check_loss_balancer(lambda num_tasks: lambda losses: losses.sqrt(), ("weights_sum_to_k",))


def test_check_loss_balancer_always_checks_that_a_rule_resumes():
    with pytest.raises(AssertionError, match="The claim 'resumes_bit_for_bit' fails"):
        check_loss_balancer(lambda num_tasks: Averaged())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda losses: losses.sum(), "shape"),
        (lambda losses: losses.double(), "dtype"),
        (lambda losses: losses.detach(), "detached"),
    ],
)
def test_check_loss_balancer_always_checks_that_a_rule_is_usable(rule, message):
    with pytest.raises(AssertionError, match=f"The claim 'usable' fails.*{message}"):
        check_loss_balancer(lambda num_tasks: rule)


def test_check_loss_balancer_names_an_unknown_claim():
    with pytest.raises(ValueError, match=r"Unknown claim on loss balancers 'seperable'\. Did you mean 'separable'"):
        check_loss_balancer(lambda num_tasks: lambda losses: losses, ("seperable",), examples=1)


def test_derivatives_let_the_rule_observe_and_end_epochs():
    events = []

    class Rule:
        def __call__(self, losses):
            return 2 * losses

        def observe(self, losses):
            events.append(losses.tolist())

        def end_epoch(self, mean_losses):
            events.append(mean_losses.tolist())

    sequence = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert derivatives(Rule(), sequence).tolist() == [[2, 2], [2, 2]]
    assert events == [[3, 4], [1, 2], pytest.approx([2.7, 3.6]), [3, 4]]
