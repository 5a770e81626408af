import pytest
import torch
from torch import nn

from balance.diagnosis import findings
from balance.diagnosis.statistics import Statistics
from tests.diagnosis.problems import Linear, Quadratics, Scaled, diagnose, text


def statistics(jacobian, losses=None):
    """Three batches with the same Jacobian."""
    J = torch.tensor(jacobian, dtype=torch.float64)
    norms = J.norm(dim=1)
    losses = torch.ones(len(J)) if losses is None else torch.tensor(losses)
    cosines = J @ J.T / norms[:, None] / norms
    tasks = tuple("abcdefgh"[: len(J)])
    return Statistics(tasks, losses.double().expand(3, -1), (J @ J.T).expand(3, -1, -1), cosines.expand(3, -1, -1))


EVEN = statistics([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])


def test_even_problem_has_none():
    problems = findings.find_problems(EVEN, EVEN)
    assert [(finding.problem, finding.present) for finding in problems] == [("loss scale", False), ("conflict", False)]


def test_losses_of_different_scale():
    diagnosis = diagnose(Scaled(small=[0.0, 1], large=[1.0, 0]), lr=1e-4)
    assert diagnosis.as_dict()["start"]["loss_ratio"] == pytest.approx(1000)
    finding = findings.loss_scale(diagnosis.end)
    assert finding.present
    assert finding.text.startswith("The gradient of 'large' is 99")
    assert "times as long as the gradient of 'small'" in finding.text
    assert finding.text.endswith("Divided by their losses, the gradients differ by a factor of 1")
    assert findings.gradient_length(diagnosis.end) is None
    assert findings.domination(diagnosis.end).text == "With equal weights the shared parameters follow only 'large'"


def test_large_losses_with_gradients_of_one_length():
    batches = [{"a": (1000.0, torch.tensor([1.0, 0]).double()), "b": (1.0, torch.tensor([0, 1.0]).double())}] * 2
    diagnosis = diagnose(Linear(2), batches)
    assert (diagnosis.loss_methods, diagnosis.gradient_methods) == ((), ())
    assert "The losses differ more, but only their gradients count." in text(diagnosis)


def test_gradients_that_a_loss_balancer_leaves_unequal():
    finding = findings.gradient_length(diagnose(Scaled(small=[0.0, 1], large=[5.0, 0]), lr=1e-4).end)
    assert finding.text.startswith("Even divided by their losses, the gradient of 'small' is ")
    assert finding.text.split()[10] in ("5", "4.99")


def test_gradients_that_no_division_by_the_loss_levels():
    batches = [{"a": (100.0, torch.tensor([1.0, 0]).double()), "b": (10.0, torch.tensor([0, 50.0]).double())}] * 2
    end = diagnose(Linear(2), batches, steps=1).end
    assert not findings.loss_scale(end).present
    assert "Division by the losses does not help" in findings.loss_scale(end).text
    assert findings.gradient_length(end).present


@pytest.mark.parametrize("b", [[2.0, 0.0], [0.0, 1.0]], ids=["aligned", "orthogonal"])
def test_no_conflict(b):
    diagnosis = diagnose(Quadratics(a=[1.0, 0], b=b), lr=1e-4)
    assert "No tasks conflict" in text(diagnosis)
    assert "Scale is no reason for a loss balancer" in text(diagnosis)


def test_opposed_tasks():
    diagnosis = diagnose(Quadratics(a=[1.0, 0], b=[-1.0, 0], c=[-2.0, 1]))
    expected = "'a' and 'b' conflict at nearly every batch (cosine -1.00 ± 0.00), as does one more pair"
    assert findings.conflict(diagnosis.start, diagnosis.end).text == expected


@pytest.mark.parametrize(("num_tasks", "others"), [(2, ""), (4, ", as do 5 more pairs")])
def test_number_of_pairs_in_conflict(num_tasks, others):
    regular = torch.eye(num_tasks) - 1 / num_tasks
    end = statistics(regular.tolist())
    assert findings.conflict(EVEN, end).text.endswith(f"){others}")


def test_conflict_that_is_noise():
    generator = torch.Generator().manual_seed(0)

    def slope():
        return torch.randn(10, generator=generator, dtype=torch.float64)

    batches = [{task: (100.0, slope()) for task in ("a", "b", "c")} for _ in range(16)]
    diagnosis = diagnose(Linear(10), batches)
    assert {pair.reading for pair in diagnosis.end.pairs} == {"noise"}
    assert 0.3 < diagnosis.end.conflict_share < 0.7
    assert (diagnosis.loss_methods, diagnosis.gradient_methods) == ((), ())
    assert "Conflict is noise" in text(diagnosis)


class Passing(nn.Module):
    """The second task pulls against the first until the parameter is beyond one half."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(()))

    def losses(self, batch):
        return {"a": 10 - batch * self.theta, "b": 10 - batch * (self.theta - 0.5).abs() / 2}


def test_conflict_that_passes():
    diagnosis = diagnose(Passing(), lr=0.1)
    assert [statistics.pairs[0].reading for statistics in (diagnosis.start, diagnosis.end)] == ["conflict", "agreement"]
    assert "No tasks conflict" in text(diagnosis)
    assert "'a' and 'b' conflict only at the start" in text(diagnosis)


@pytest.mark.parametrize(
    ("shorter", "leader"),
    [([0.4, 0, 0], None), ([0.3, 0, 0], "b"), ([-0.4, 0.4, 0], "b")],
    ids=["share of 86 %", "share of 92 %", "the sum raises the other loss"],
)
def test_domination(shorter, leader):
    finding = findings.domination(statistics([shorter, [0, 0, 1.0] if leader != "b" or shorter[1] == 0 else [1.0, 0, 0]]))
    assert (None if finding is None else finding.text.split("'")[1]) == leader


@pytest.mark.parametrize(
    ("before", "after", "evidence"),
    [
        ([2.0, 4.0], [1.0, 3.9], None),
        ([2.0, 4.0], [0.9, 3.8], "the loss of 'a' is at 45 % of its loss at the start, the loss of 'b' at 95 %"),
        ([2.0, 4.0], [2.0, 8.4], "the loss of 'a' is at 100 % of its loss at the start, the loss of 'b' at 210 %"),
        ([2.0, 4.0], [-1.0, 4.0], None),  # the sizes of losses of both signs mean nothing
        ([2.0, 0.0], [1.0, 1.0], None),
    ],
)
def test_training_pace(before, after, evidence):
    start, end = (statistics([[1.0, 0], [0, 1.0]], losses) for losses in (before, after))
    finding = findings.training_pace(start, end)
    assert (finding is None) == (evidence is None)
    assert finding is None or finding.text == f"Tasks learn at different speed: {evidence}"


@pytest.mark.parametrize(("common", "present"), [(0.1, True), (0.3, False)])
def test_local_minima(common, present):
    finding = findings.local_minima(statistics([[1.0, common], [-1.0, common]]))
    assert (finding is not None) == present
    if finding is not None:
        assert "their sum has 14 % of the length of the sum of orthogonal gradients" in finding.text
