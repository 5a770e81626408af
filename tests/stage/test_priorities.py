"""Priorities of the tasks: ``Balancer(weights=...)``."""

import warnings

import pytest
import torch

from balance import Balancer, compose, gradient_balancers, loss_balancers
from balance.config import StageConfig, build_balancer, methods_schema
from balance.config import compose as compose_config

J = torch.tensor([[1.0, 2.0, 0.0], [-1.0, 1.0, 3.0], [0.5, -2.0, 1.0]], dtype=torch.float64)
TASKS = ("a", "b", "c")
PRIORITIES = {"b": 2.0, "c": 0.5}
VALUES = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)  # the same, for all tasks
RETURN_WEIGHTS = [name for name in gradient_balancers.names() if gradient_balancers.sees(name) == "gramian"]
EQUALISE = [name for name in RETURN_WEIGHTS if "gradient length" in gradient_balancers.traits(name).remedies]


def step(loss="ls", gradient=None, losses=(1.0, 2.0, 4.0), tasks=TASKS, **options):
    """One step at theta = 0, whose task gradients are the rows of J; return weights of the raw gradients, and ``.grad``."""
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    values = torch.tensor(losses, dtype=torch.float64) + J @ theta
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of redundant pairs
        balancer = Balancer(TASKS, loss=loss, gradient=gradient, **options)
    report = balancer.backward({k: v for k, v in zip(TASKS, values, strict=True) if k in tasks}, shared=[theta])
    return (report.loss_weights if gradient is None else report.total_weights), theta.grad


@pytest.mark.parametrize("loss", loss_balancers.names())
def test_priorities_multiply_the_weights_of_every_loss_balancer(loss):
    (without, _), (weights, grad) = step(loss), step(loss, weights=PRIORITIES)
    torch.testing.assert_close(weights, without * VALUES)
    torch.testing.assert_close(grad, (without * VALUES) @ J)


@pytest.mark.parametrize("gradient", [name for name in RETURN_WEIGHTS if name not in EQUALISE])
def test_other_gradient_balancers_see_the_multiplied_losses(gradient):
    weights, grad = step("ls", gradient, weights=PRIORITIES)
    rule = gradient_balancers.build(gradient, num_tasks=3, **({"seed": 1} if _draws(gradient) else {}))
    scaled = VALUES[:, None] * J
    keywords = {"losses": torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)} if _takes_losses(gradient) else {}
    expected = rule(scaled @ scaled.T, **keywords)
    torch.testing.assert_close(weights, expected * VALUES)
    torch.testing.assert_close(grad, expected @ scaled)


@pytest.mark.parametrize("gradient", EQUALISE)
def test_a_rule_that_equalises_lengths_does_not_undo_priorities(gradient):
    (without, _), (weights, grad) = step("ls", gradient), step("ls", gradient, weights=PRIORITIES)
    expected = without * VALUES
    torch.testing.assert_close(weights * expected.sum(), expected * weights.sum())  # but for the length of the direction
    torch.testing.assert_close(grad, weights @ J)


def test_a_direction_of_fixed_length_keeps_it():
    for gradient in ("nashmtl", compose.every(2, "nashmtl", 3)):
        _, grad = step("ls", gradient, weights=PRIORITIES)
        assert grad.norm().item() == pytest.approx(1.0)


def test_equal_priorities_are_a_factor():
    for gradient in ("mgda", "pcgrad", "imtl"):
        (without, _), (weights, _) = step("ls", gradient), step("ls", gradient, weights=[3.0, 3.0, 3.0])
        torch.testing.assert_close(weights, 3 * without)


def test_priorities_belong_to_tasks_that_can_be_absent():
    weights, _ = step("scaleinvls", "mgda", tasks=("b", "c"), weights=PRIORITIES)
    without, _ = step("scaleinvls", "mgda", tasks=("b", "c"))
    torch.testing.assert_close(weights, without * VALUES[1:])


def test_heads_get_priorities_once():
    theta, head = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    balancer = Balancer(("a", "b"), gradient="pcgrad", weights={"b": 5.0})
    balancer.backward({"a": theta + 1, "b": theta + 2 * head + 1}, shared=[theta])
    assert (theta.grad.item(), head.grad.item()) == (6.0, 10.0)


@pytest.mark.parametrize("weights", [{"d": 1.0}, {"a": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"a": "2"}, [1.0, 2.0], "abc"])
def test_wrong_priorities_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        Balancer(TASKS, weights=weights)


def test_priorities_from_the_command_line():
    loss, gradient = methods_schema("ls", None)
    settings = {"loss_method": "ls", "gradient_method": None, "seed": 0, "loss": loss(), "gradient": gradient()}
    stage = compose_config(StageConfig(), {}, ["weights.b=2"])
    balancer = build_balancer(_config(settings, stage), TASKS)
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    report = balancer.backward(torch.ones(3, dtype=torch.float64) + J @ theta)
    assert report.loss_weights.tolist() == [1.0, 2.0, 1.0]


def _config(settings, stage):
    from omegaconf import OmegaConf

    return OmegaConf.create(settings | {"balancer": stage})


def _draws(name):
    return "seed" in gradient_balancers.options(name)


def _takes_losses(name):
    rule = gradient_balancers.build(name, num_tasks=3)
    import inspect

    return "losses" in inspect.signature(getattr(rule, "forward", rule)).parameters
