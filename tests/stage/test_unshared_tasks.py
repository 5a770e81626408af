import pytest
import torch
from torch import nn

from balance import Balancer, compose

# Tasks that do not reach what is shared


@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
@pytest.mark.parametrize("source", ["parameters", "features"])
@pytest.mark.parametrize("gradient", ["mgda", "imtl", "nashmtl", "pcgrad", "cagrad", "graddrop", "every"])
def test_a_task_without_path_to_the_shared_parameters_is_trained_by_itself(gradient, source, heads):
    if gradient == "graddrop" and heads == "weighted":
        pytest.skip("it has no weights")
    results = []
    for with_probe in (False, True):
        torch.manual_seed(0)
        trunk, a, b, probe = nn.Linear(6, 16), nn.Linear(16, 1), nn.Linear(16, 2), nn.Linear(16, 1)
        rule = compose.every(3, "mgda", 3) if gradient == "every" else gradient
        stage = Balancer(("a", "probe", "b"), gradient=rule, source=source, heads=heads, seed=3)
        x = torch.randn(8, 6)
        for _ in range(2):
            z = trunk(x).tanh()
            losses = {"a": a(z).square().mean(), "b": (b(z) - 1).square().mean()}
            if with_probe:
                losses["probe"] = (probe(z.detach()) - 2).square().mean()
            report = stage.backward(losses, shared=trunk.parameters(), features=z)
        results.append([p.grad.clone() for module in (trunk, a, b) for p in module.parameters()])
        assert report.unshared == (("probe",) if with_probe else ())
    torch.testing.assert_close(results[1], results[0])
    (own,) = torch.autograd.grad((probe(z.detach()) - 2).square().mean(), [probe.weight])
    torch.testing.assert_close(probe.weight.grad, 2 * own)
    if report.gradient_weights is not None:
        assert report.gradient_weights[report.tasks.index("probe")] == 1


def test_a_task_that_reaches_the_shared_part_through_the_loss_balancer_takes_part():
    shared, own = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    losses = {"a": shared.square().sum(), "b": own.sum()}
    seen = []

    def rule(gramian):
        seen.append(gramian.shape)
        return torch.ones(len(gramian))

    Balancer(("a", "b"), loss=lambda L: L * L.flip(0), gradient=rule).backward(losses, shared=[shared])
    assert seen == [(2, 2)]
    torch.testing.assert_close(shared.grad, torch.full((2,), 2 * 2 * 2.0))


# Empty tasks


@pytest.mark.parametrize("options", [{"loss": "famo"}, {"loss": "uw"}, {"loss": "go4align"}, {"gradient": "mgda"}], ids=str)
def test_a_loss_of_zero_can_stand_for_an_absent_task(options):
    results = []
    for empty in (False, True):
        theta = torch.ones(2, requires_grad=True)
        stage = Balancer(("a", "empty", "b"), zero="absent", **options)
        losses = {"a": theta.square().sum(), "b": (theta - 3).square().sum()}
        if empty:
            losses["empty"] = (0 * theta).sum()
        report = stage.backward(losses, shared=[theta])
        assert report.tasks == ("a", "b")
        results.append((theta.grad, report.loss_weights))
    torch.testing.assert_close(*results)


def test_zero_losses_of_a_vector_can_be_absent():
    theta = torch.ones(2, requires_grad=True)
    report = Balancer(3, zero="absent", gradient="mgda").backward(
        torch.stack([theta.sum(), 0 * theta.sum(), theta.square().sum()]), shared=[theta]
    )
    assert report.tasks == ("0", "2")


def test_a_gradient_of_zero_is_left_out_of_the_rule_where_zero_means_absent():
    theta, head = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    losses = {"a": theta.square().sum(), "b": 1 + (0 * theta).sum() + head.sum()}
    report = Balancer(("a", "b"), zero="absent", gradient="mgda").backward(losses, shared=[theta])
    assert report.unshared == ("b",)
    assert theta.grad.tolist() == [2, 2]
    assert head.grad.tolist() == [1, 1]


def test_all_losses_zero_is_an_error():
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="All losses are NaN or zero"):
        Balancer(1, zero="absent").backward([(0 * theta).sum()][0][None])


def test_a_number_for_an_absent_task_is_told_what_to_do():
    with pytest.raises(TypeError, match="Leave a task that has no labels in this batch out of the dict"):
        Balancer(("a", "b")).backward({"a": torch.ones((), requires_grad=True), "b": 0.0})
