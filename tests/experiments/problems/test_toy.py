import math

import numpy as np
import pytest
import torch

from balance import Balancer
from experiments.problems.toy import DataConfig, ModelConfig, build_model, load, losses, metrics, targets
from experiments.problems.toy import landscape as field
from experiments.problems.toy.descent import build_balancer, descend
from experiments.problems.toy.landscape import STARTS, gradients, pareto_set, values
from tests.experiments.problems.toy_closed_forms import values_and_gradients

BOTTOM = -8.3552  # b of the Pareto set in its middle


# --- landscape -------------------------------------------------------------------------------------------------------


def test_values_by_hand():
    # far above b = 0 all tanh are 1 or -1: f1 = log|(-a - 7) / 2 + 1| + 6, f2 = log|(-a + 3) / 2 + 1| + 6
    np.testing.assert_allclose(values(np.array([7.0, 50.0]), scale=1), [math.log(6) + 6, 6], rtol=1e-12)
    # far below it the bowls are left
    np.testing.assert_allclose(values(np.array([4.0, -58.0]), scale=0.1), [0.1 * (0.9 + 25 - 20), 12.1 + 25 - 20], rtol=1e-12)
    assert (values(np.zeros(2)) == 0).all()


def test_the_second_logarithm_has_the_sign_of_the_codes():
    """With it the valley of f2 lies at a = 5, with the printed one at a = 9."""
    np.testing.assert_allclose(values(np.array([5.0, 50.0]))[1], math.log(5e-6) + 6, rtol=1e-12)
    assert values(np.array([9.0, 50.0]))[1] > 6


def test_both_tasks_pull_on_the_kink():
    point = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    logarithm, bowl = math.log(3.5) + 6, (49 + 6.4) / 10 - 20  # f1 = f2 and g1 = g2 at (0, 0)
    for task in ("f1", "f2"):
        (gradient,) = torch.autograd.grad(field.losses(point)[task], point)
        np.testing.assert_allclose(gradient, [0, 0.5 * logarithm - 0.5 * bowl], rtol=1e-12)


def test_closed_derivatives_are_those_of_autograd():
    generator = np.random.default_rng(0)
    points = np.concatenate([generator.uniform(-11, 11, (300, 2)), STARTS, [[3, 0], [5, 30], [-5, 1e-9], [5, -40]]])
    tensor = torch.tensor(points, requires_grad=True)
    raw = [field.losses(tensor)[task] for task in ("f1", "f2")]
    expected = np.array([torch.autograd.grad(loss.sum(), tensor)[0].T.numpy() for loss in raw])
    L, J = values_and_gradients(points.T.copy(), scale=0.3)
    np.testing.assert_allclose(L, [[0.3], [1]] * torch.stack(raw).detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(J, [[[0.3]], [[1]]] * expected, rtol=1e-9, atol=1e-12)


def test_losses_lie_above_their_bound():
    side = np.linspace(-12, 12, 401)
    grid = values(np.stack(np.meshgrid(side, side), axis=-1), scale=1)
    assert grid.min() > field.LOWER_BOUND + 0.9


def test_pareto_set():
    front = pareto_set(101)
    assert front[50] == pytest.approx([0, BOTTOM], abs=1e-4)
    _, J = values_and_gradients(front.T.copy(), scale=1)
    np.testing.assert_allclose(gradients(front), J.swapaxes(1, 2), rtol=1e-9, atol=1e-12)
    cosines = (J[0] * J[1]).sum(axis=0)[1:-1] / np.sqrt((J[0] ** 2).sum(axis=0) * (J[1] ** 2).sum(axis=0))[1:-1]
    np.testing.assert_allclose(cosines, -1, atol=1e-9)
    assert np.linalg.norm(J[1, :, 0]) < 1e-6  # the ends are the minima
    assert np.linalg.norm(J[0, :, -1]) < 1e-6
    L = values(front)
    assert (np.diff(L[:, 0]) < 0).all()
    assert (np.diff(L[:, 1]) > 0).all()


def test_no_point_of_the_plane_is_better_in_both_than_the_pareto_set():
    side = np.linspace(-11, 11, 301)
    others = values(np.stack(np.meshgrid(side, side), axis=-1)).reshape(-1, 2)
    front = values(pareto_set(401))
    for point in front[::20]:
        assert not (others < point - 1e-4).all(axis=1).any()


# --- the problem of the trainer -----------------------------------------------------------------------------------


def test_the_experiment_is_the_landscape():
    model = build_model(ModelConfig(a=9.0, b=-1.0))
    splits = load(DataConfig(steps=7, scale=0.5))
    assert [len(split) for split in splits] == [7, 1, 1]
    batch = splits.train[[0, 3]]
    outputs = model(batch[0])
    L = values(np.array([9.0, -1.0]), scale=0.5)
    assert [loss.item() for loss in losses(outputs, batch).values()] == pytest.approx([L[0] + 10.5, L[1] + 21], rel=1e-5)
    assert [p.tolist() for p in model.trunk.parameters()] == [[[9.0, -1.0]]]
    assert list(model.heads.parameters()) == []
    measured = {name: metric(outputs[name[:2]], targets(batch)[name[:2]]).item() for name, metric in metrics().items()}
    assert measured == pytest.approx({"f1/above_bound": 2 * L[0] + 21, "f2/above_bound": L[1] + 21}, rel=1e-5)


def test_steps_of_the_experiment_are_those_of_the_trajectory():
    model, splits = build_model(ModelConfig(a=9.0, b=-1.0)), load(DataConfig())
    balancer = Balancer(("f1", "f2"), gradient="mgda")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(40):
        batch = splits.train[[step]]
        optimizer.zero_grad()
        balancer.backward(losses(model(batch[0]), batch), shared=model.trunk.parameters())
        optimizer.step()
    expected = descend(build_balancer("mgda"), (9.0, -1.0), 40, lr=0.05, beta2=0.999)
    np.testing.assert_allclose(model.trunk.theta.detach()[0], expected[-1], atol=1e-3)


@pytest.mark.parametrize(("config", "message"), [({"steps": 0}, "at least 1"), ({"scale": 0.0}, "must be positive")])
def test_bad_data(config, message):
    with pytest.raises(ValueError, match=message):
        load(DataConfig(**config))
