"""Gramians in the metric of an optimizer, next to the definition J P^-1 J^T."""

import copy

import pytest
import torch
from torch import nn

import balance
from balance import Balancer, compose
from balance.engine.metric import OptimizerMetric

KINDS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(7, 1) for _ in range(3))

    def losses(self, x):
        z = self.trunk(x)
        return z, [(head(z) - k).square().mean() * 4**k for k, head in enumerate(self.heads)]


def trained(kind, steps=3):
    """A network and an optimizer that has made some steps."""
    torch.manual_seed(1)
    net = Net().double()
    optimizer = KINDS[kind](net.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        sum(net.losses(torch.randn(5, 12, dtype=torch.float64))[1]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net, optimizer


def diagonal(optimizer, p):
    """P by the documentation of torch.optim."""
    state, group = optimizer.state[p], optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.Adam):
        v = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        return (v / (1 - 0.999 ** int(state["step"]))).sqrt() + 1e-8
    if isinstance(optimizer, torch.optim.RMSprop):
        v = state["square_avg"] - (state["grad_avg"] ** 2 if group["centered"] else 0)
        return v.sqrt() + 1e-8
    return state["sum"].sqrt() + 1e-10


def jacobian(net, losses):
    shared = list(net.trunk.parameters())
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


ENGINES = [{}, {"engine": "batched"}, {"memory": "gramian"}, {"scale": "norm"}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ENGINES, ids=str)
@pytest.mark.parametrize("hint", [False, True])
@pytest.mark.parametrize("collected", [False, True])
def test_gramian_by_definition(kind, options, hint, collected):
    net, optimizer = trained(kind)
    x = torch.randn(5, 12, dtype=torch.float64)
    z, losses = net.losses(x)
    J = jacobian(net, losses)
    P = torch.cat([diagonal(optimizer, p).flatten() for p in net.trunk.parameters()])
    expected = (J / P) @ J.T
    balancer = Balancer(3, gradient="mgda", metric=optimizer, **options)
    shared, features = list(net.trunk.parameters()), z if hint else None
    if collected:
        with balancer.collect():
            balancer.backward(torch.stack(losses), shared=shared, features=features)
        report = balancer.report
    else:
        report = balancer.backward(torch.stack(losses), shared=shared, features=features)
    torch.testing.assert_close(report.gramian, expected, rtol=1e-10, atol=0)
    weights = balance.gradient_balancers.build("mgda")(expected)
    if options.get("scale") == "norm":
        weights = weights * (expected.sum() / (weights @ expected @ weights)).sqrt()
    torch.testing.assert_close(report.total_weights, weights, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in shared]), weights @ J, rtol=1e-8, atol=1e-10)


def test_diagonal_is_the_one_of_the_next_step():
    """RMSprop with alpha = 1 keeps its squares, so that its step along d is exactly P^-1 d."""
    net, optimizer = trained("rmsprop")
    optimizer.param_groups[0]["alpha"] = 1.0
    shared = list(net.trunk.parameters())
    roots = OptimizerMetric(optimizer).roots(shared)
    before = [p.detach().clone() for p in shared]
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p, old, root in zip(shared, before, roots, strict=True):
        torch.testing.assert_close(old - p.detach(), 0.01 * root.square() * p.grad)


def test_sgd_and_a_fresh_optimizer_have_the_usual_metric():
    net, _ = trained("adam")
    for optimizer in (torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), torch.optim.Adam(net.parameters())):
        reports = []
        for metric in (None, optimizer):
            _, losses = net.losses(torch.ones(4, 12, dtype=torch.float64))
            balancer = Balancer(3, gradient="nashmtl", metric=metric)
            reports.append(balancer.backward(losses=torch.stack(losses), shared=net.trunk.parameters()))
        torch.testing.assert_close(reports[0].gramian, reports[1].gramian)
        torch.testing.assert_close(reports[0].gradient_weights, reports[1].gradient_weights)


def test_learning_rates_of_groups_count():
    net = Net().double()
    a, b = list(net.trunk[0].parameters()), list(net.trunk[2].parameters())
    optimizer = torch.optim.SGD(
        [{"params": a, "lr": 0.1}, {"params": b, "lr": 0.4}, {"params": net.heads.parameters(), "lr": 9}]
    )
    assert [root.unique().item() for root in OptimizerMetric(optimizer).roots([*a, *b])] == [0.5, 0.5, 1.0, 1.0]


def test_a_parameter_without_state_has_the_mean_of_the_others():
    theta, new = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([theta, new])
    theta.grad = torch.tensor([1.0, 4.0])
    optimizer.step()
    known, unknown = OptimizerMetric(optimizer).roots([theta, new])
    torch.testing.assert_close(known.square(), torch.tensor([1.0, 0.25]))
    torch.testing.assert_close(unknown.square(), torch.full((3,), 0.625))


def test_a_coordinate_without_history_does_not_dominate():
    theta = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    optimizer = torch.optim.Adam([theta])
    theta.grad = torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64)
    optimizer.step()
    (root,) = OptimizerMetric(optimizer).roots([theta])
    torch.testing.assert_close(root.square(), torch.tensor([1.0, 0.25, 0.625], dtype=torch.float64), rtol=1e-7, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch's Adagrad
def test_sparse_gradients():
    embedding = nn.Embedding(6, 2, sparse=True, dtype=torch.float64)
    optimizer = torch.optim.Adagrad(embedding.parameters())
    embedding(torch.tensor([1, 2, 2])).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()

    def losses():
        return torch.stack([embedding(torch.tensor(rows)).square().sum() for rows in ([1, 2], [2, 2, 5])])

    J = torch.stack(
        [torch.autograd.grad(loss, embedding.weight, retain_graph=True)[0].to_dense().flatten() for loss in losses()]
    )
    P = optimizer.state[embedding.weight]["sum"].sqrt().flatten() + 1e-10
    history = P > 1e-10
    P[~history] = 1 / (1 / P[history]).mean()  # rows without history have the mean of the others
    for collected in (False, True):
        balancer = Balancer(2, gradient="mgda", metric=optimizer)
        if collected:
            with balancer.collect():
                balancer.backward(losses(), shared=embedding.parameters())
        else:
            balancer.backward(losses(), shared=embedding.parameters())
        torch.testing.assert_close(balancer.report.gramian, (J / P) @ J.T, rtol=1e-9, atol=0)


def test_half_precision_parameters():
    torch.manual_seed(0)
    theta = nn.Parameter(torch.randn(50).to(torch.bfloat16))
    optimizer = torch.optim.Adam([theta], lr=0.01)
    theta.grad = torch.randn(50).to(torch.bfloat16)
    optimizer.step()
    losses = torch.stack([(theta * torch.randn(50).to(torch.bfloat16)).sum().float() for _ in range(2)])
    J = torch.stack([torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses]).double()
    P = (optimizer.state[theta]["exp_avg_sq"].double() / 0.001).sqrt() + 1e-8
    report = Balancer(2, gradient="mgda", metric=optimizer).backward(losses, shared=[theta])
    torch.testing.assert_close(report.gramian.double(), (J / P) @ J.T, rtol=0.03, atol=0.03 * float(((J / P) @ J.T).max()))


def test_set_later_and_copied():
    net, optimizer = trained("adam")
    balancer = Balancer(3, gradient="mgda")
    assert balancer.metric is None
    balancer.metric = optimizer
    twin = copy.deepcopy(balancer)
    assert twin.metric.optimizer is optimizer  # a copy of the stage alone measures by the same optimizer
    pair = copy.deepcopy((optimizer, balancer, net))
    assert pair[1].metric.optimizer is pair[0]
    balancer.metric = None
    assert balancer.metric is None
    rule = compose.every(2, "mgda", 3)
    assert Balancer(3, gradient=rule, metric=optimizer).metric.optimizer is optimizer


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_a_wrapper_of_an_optimizer():
    _, optimizer = trained("adam")
    assert OptimizerMetric(Wrapper(Wrapper(optimizer))).optimizer is optimizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": None}, "needs a gradient balancer that returns weights"),
        ({"gradient": "graddrop"}, "needs a gradient balancer that returns weights"),
        ({"gradient": "mgda", "source": "features"}, "no\n? ?diagonal for features"),
    ],
)
def test_pairs_without_meaning_are_refused(options, message):
    _, optimizer = trained("adam")
    with pytest.raises(ValueError, match=message):
        Balancer(3, metric=optimizer, **options)


def test_errors():
    net, optimizer = trained("adam")
    with pytest.raises(TypeError, match="LBFGS"):
        Balancer(3, gradient="mgda", metric=torch.optim.LBFGS(net.parameters()))
    other = torch.optim.Adam(net.heads.parameters())
    _, losses = net.losses(torch.ones(4, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match="lacks 4 of 4"):
        Balancer(3, gradient="mgda", metric=other).backward(torch.stack(losses), shared=net.trunk.parameters())
    with pytest.raises(ValueError, match="measure cannot be combined"):
        Balancer(3, gradient="mgda", metric=optimizer).backward(
            torch.stack(losses), shared=net.trunk.parameters(), measure=net.trunk[2].parameters()
        )
    optimizer.state[net.trunk[0].weight]["exp_avg_sq"].fill_(float("nan"))
    with pytest.raises(ValueError, match="must be finite"):
        Balancer(3, gradient="mgda", metric=optimizer).backward(torch.stack(losses), shared=net.trunk.parameters())
