import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balance import Balancer, Splitter
from balance.gradient.min_norm import mgda
from balance.gradient.projection import project_conflicts
from balance.splitter.per_sample import project_samples, shortest_between
from tests.splitter.views import RULES, TASKS, Network, assert_same, data, gradients, merged
from tests.strategies import SEEDS

# Published numbers


# What NormalizedMultiTaskSplitter of guillaumeBellec/multitask gives in float64: step t brings task a the gradient
# (t+1) [[1,2,0],[0,1,1]], zero in the first two steps of "zero_task_a_first", and task b [[-1,0,2],[3,0,-1]]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text(encoding="utf-8"))["splitter"]


@pytest.mark.parametrize("key", GOLDEN)
def test_golden(key):
    options = {"gradient": None if key.endswith("dummyTrue") else "normalized"}
    if key.startswith("variant"):
        options["projection"] = int(key[len("variant")])
    splitter = Splitter(("a", "b"), weights=(1, 3) if key == "weights_1_3" else None, **options)
    a = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[-1.0, 0.0, 2.0], [3.0, 0.0, -1.0]], dtype=torch.float64)
    for t, step in enumerate(GOLDEN[key]):
        factor = 0 if key == "zero_task_a_first" and t < 2 else t + 1
        torch.testing.assert_close(
            merged(splitter, [factor * a, b]), torch.tensor(step["g"], dtype=torch.float64), rtol=1e-13, atol=1e-14
        )
        assert splitter.squares.tolist() == pytest.approx(step["m"], rel=1e-14)
        assert splitter.counts.tolist() == step["t"]


# The same as the stage


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5)])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_the_balancer_on_features(rule, weights):
    splitter = Splitter(TASKS, gradient=rule, weights=weights, seed=5)
    network, twin = Network(splitter), Network(lambda z: dict.fromkeys(TASKS, z))
    balancer = Balancer(TASKS, gradient=rule, source="features", heads="unweighted", seed=5)
    for t in range(3):
        x = data(t)
        network.zero_grad()
        sum(network.losses(x).values()).backward()
        twin.zero_grad()
        z = twin.trunk(x)
        views = dict.fromkeys(TASKS, z)
        losses = {k: (twin.heads[k](views[k]) - i).square().mean() * 10**i for i, k in enumerate(TASKS)}
        e = dict(zip(TASKS, weights or (1, 1, 1), strict=True))
        report = balancer.backward({k: e[k] * loss for k, loss in losses.items()}, shared=twin.trunk.parameters(), features=z)
        for task in TASKS:  # weights of the splitter are of the features' gradients, not of the heads'
            for p in twin.heads[task].parameters():
                p.grad /= e[task]
        assert_same(network.grads(), twin.grads(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(splitter.report.gramian, report.gramian)
        torch.testing.assert_close(splitter.report.cosines, report.cosines)
        if report.gradient_weights is not None:
            torch.testing.assert_close(splitter.report.gradient_weights, report.gradient_weights)


def test_report_says_what_was_done():
    splitter = Splitter(TASKS, weights={"a": 1, "b": 2, "c": 1})
    assert splitter.report is None
    J = gradients(0, 3)
    direction = merged(splitter, [J[0], None, J[2]])
    report = splitter.report
    assert report.tasks == ("a", "c")
    assert report.loss_weights.tolist() == [0.25, 0.25]
    weights = report.loss_weights * report.gradient_weights
    torch.testing.assert_close(torch.einsum("k,kbf->bf", weights, J[[0, 2]]), direction)
    assert report.losses.isnan().all()
    assert report.gramian is None


def test_report_of_a_projection_has_no_weights_of_the_batch():
    splitter = Splitter(2, projection=1)
    J = gradients(0, 2)
    merged(splitter, J)
    assert splitter.report.gradient_weights is None
    flat = J.flatten(1) / 2
    torch.testing.assert_close(splitter.report.gramian, flat @ flat.T)


# The normalisation


FACTORS = st.lists(st.floats(-6, 6), min_size=3, max_size=3)


@given(seed=SEEDS, exponents=FACTORS, projection=st.sampled_from([0, 1, 3]))
def test_a_constant_factor_on_a_loss_is_cancelled(seed, exponents, projection):
    plain, scaled = Splitter(3, projection=projection), Splitter(3, projection=projection)
    for t in range(3):
        J = gradients(seed + t, 3)
        factors = 10.0 ** torch.tensor(exponents, dtype=torch.float64)
        torch.testing.assert_close(merged(scaled, J * factors[:, None, None]), merged(plain, J), rtol=1e-9, atol=1e-12)


@given(seed=SEEDS, weights=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any))
def test_at_the_first_step_every_gradient_gets_its_weight_as_length(seed, weights):
    J = gradients(seed, len(weights))
    splitter = Splitter(len(weights), weights=weights)
    units = J / J.square().sum(dim=2).mean(dim=1).sqrt()[:, None, None]
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    torch.testing.assert_close(merged(splitter, J), torch.einsum("k,kbf->bf", shares, units))


@given(seed=SEEDS, tasks=st.integers(1, 5), batch=st.integers(1, 4), size=st.integers(1, 4))
def test_samples_are_projected_as_pcgrad_projects_gradients(seed, tasks, batch, size):
    J = gradients(seed, tasks, batch, size).transpose(0, 1)
    C = J @ J.transpose(1, 2)
    generator = torch.Generator().manual_seed(seed)
    orders = [[j for j in torch.randperm(tasks, generator=generator).tolist() if j != i] for i in range(tasks)]
    orders = torch.tensor(orders, dtype=torch.int64).reshape(tasks, tasks - 1)
    found = project_samples(C, orders)
    for sample, coefficients in zip(C, found, strict=True):
        expected = torch.from_numpy(project_conflicts(sample.numpy(), orders.numpy()))
        torch.testing.assert_close(coefficients.sum(dim=0), expected, rtol=1e-8, atol=1e-8)
    if tasks == 2:
        left = found @ J
        assert ((left @ J.transpose(1, 2)).flatten() > -1e-9 * C.abs().max()).all()


@given(seed=SEEDS, batch=st.integers(1, 4), size=st.integers(1, 4))
def test_shortest_is_mgda_of_every_sample(seed, batch, size):
    J = gradients(seed, 2, batch, size)
    splitter = Splitter(2, gradient=None, projection=2)
    expected = torch.stack([mgda(rows @ rows.T) @ rows for rows in J.transpose(0, 1) / 2])
    torch.testing.assert_close(merged(splitter, J), expected, rtol=1e-8, atol=1e-10)
    assert shortest_between(torch.ones(1, 2, 2, dtype=torch.float64)).sum() == 1  # equal gradients


def test_samples_of_images_are_flattened():
    J = gradients(3, 2, 4, 12)
    for projection in ("none", "after_norm", "shortest", "before_norm"):
        flat = merged(Splitter(2, projection=projection), J)
        image = merged(Splitter(2, projection=projection), J.view(2, 4, 3, 2, 2))
        torch.testing.assert_close(image.flatten(1), flat)


def test_random_orders_are_drawn_anew():
    J = gradients(0, 4, 8, 3)
    splitter = Splitter(4, gradient=None, projection=1)
    found = [merged(splitter, J) for _ in range(6)]
    assert any((found[0] != other).any() for other in found[1:])
    torch.testing.assert_close(merged(Splitter(4, gradient=None, projection=1), J), found[0], rtol=0, atol=0)
