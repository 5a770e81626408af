"""Micro-batches inside of collect(): exactly the step of all their samples in one batch."""

import gc
import weakref

import pytest
import torch
from torch import nn

import balance
from balance import Balancer
from tests.stage.three_tasks import TASKS, Network, assert_same, assert_same_state

PAIRS = (
    {},
    {"loss": "uw"},
    {"loss": "famo"},
    {"gradient": "mgda"},
    {"gradient": "pcgrad", "loss": "go4align"},
    {"gradient": "nashmtl", "scale": "norm"},
    {"gradient": "cagrad", "loss": "uw"},
    {"gradient": "graddrop"},
    {"gradient": "imtl", "source": "features"},
)


def losses_of(network, rows):
    """Mean losses of the tasks that have rows, numbers of rows, and features."""
    z = network.trunk(network.x)
    present = [task for task in TASKS if len(rows[task])]
    losses = {t: (network.heads[t](z)[rows[t]] - i).square().mean() * 10**i for i, t in enumerate(TASKS) if t in present}
    return losses, {task: len(rows[task]) for task in present}, z


ALL = dict.fromkeys(TASKS, torch.arange(16))
PARTS = {
    "equal": [dict.fromkeys(TASKS, torch.arange(16)[i::4]) for i in range(4)],
    "unequal": [dict.fromkeys(TASKS, torch.arange(16)[part]) for part in (slice(0, 3), slice(3, 4), slice(4, 16))],
    "one task each": [{t: ALL[t] if t == task else ALL[t][:0] for t in TASKS} for task in TASKS],
    "mixed": [
        {"a": ALL["a"][:5], "b": ALL["b"][:0], "c": ALL["c"][:9]},
        {"a": ALL["a"][5:], "b": ALL["b"], "c": ALL["c"][:0]},
        {"a": ALL["a"][:0], "b": ALL["b"][:0], "c": ALL["c"][9:]},
    ],
}


def double(seed=0):
    network = Network(seed).double()
    network.x = network.x.double()
    return network


def train(options, parts, steps=3, factor=1.0, scaler=None):
    network, balancer = double(), Balancer(TASKS, **options)
    optimizer = torch.optim.Adam([*network.parameters(), *balancer.parameters()], lr=0.01)
    grads = []
    for _ in range(steps):
        optimizer.zero_grad()
        given = {"shared": list(network.shared()), "scaler": scaler}
        if parts is None:
            losses, _, z = losses_of(network, ALL)
            report = balancer.backward(losses, features=z if "source" in options else None, factor=factor, **given)
        else:
            with balancer.collect(factor=factor):
                for rows in parts:
                    losses, counts, z = losses_of(network, rows)
                    balancer.backward(losses, counts=counts, features=z if "source" in options else None, **given)
            report = balancer.report
        grads.append(network.grads())
        optimizer.step()
        if balancer.needs_observation:
            with torch.no_grad():
                balancer.observe(losses_of(network, ALL)[0])
        balancer.end_epoch()
    return grads, balancer.state_dict(), report


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("options", PAIRS, ids=str)
def test_micro_batches_are_one_batch(options, parts):
    if "source" in options and parts not in ("equal", "unequal"):
        pytest.skip("the features of two forward passes are different samples")
    grads, state, report = train(options, PARTS[parts], factor=0.5)
    expected, expected_state, expected_report = train(options, None, factor=0.5)
    for mine, theirs in zip(grads, expected, strict=True):
        assert_same(mine, theirs, rtol=1e-9, atol=1e-11)
    for name, value in expected_state.items():
        torch.testing.assert_close(state[name].double(), value.double(), rtol=1e-9, atol=1e-11, equal_nan=True)
    torch.testing.assert_close(report.losses.double(), expected_report.losses.double(), rtol=1e-9, atol=0)
    if expected_report.gramian is not None:
        torch.testing.assert_close(report.gramian, expected_report.gramian, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", [{"gradient": "mgda", "loss": "uw"}, {}], ids=str)
def test_micro_batches_may_be_given_where_autograd_records_nothing(options):
    network, other = double(), double()
    balancer = Balancer(TASKS, **options)
    with balancer.collect():
        losses, counts, _ = losses_of(network, ALL)
        with torch.no_grad():
            balancer.backward(losses, counts=counts, shared=list(network.shared()))
    Balancer(TASKS, **options).backward(losses_of(other, ALL)[0], shared=list(other.shared()))
    assert_same(network.grads(), other.grads(), rtol=1e-9, atol=1e-11)


def test_reused_weights_of_micro_batches_are_reused_weights_of_one_batch():
    grads, _, report = train({"gradient": balance.compose.every(2, "mgda", 3)}, PARTS["mixed"], steps=4)
    expected, _, _ = train({"gradient": balance.compose.every(2, "mgda", 3)}, None, steps=4)
    assert report.gramian is None
    for mine, theirs in zip(grads, expected, strict=True):
        assert_same(mine, theirs, rtol=1e-9, atol=1e-11)


def test_conflicts_are_seen_where_every_micro_batch_has_one_task():
    w = torch.zeros(2, requires_grad=True)
    balancer = Balancer(("math", "code"), gradient="pcgrad")
    slopes = {"math": torch.tensor([1.0, 0.2]), "code": torch.tensor([-1.0, 0.2])}
    with balancer.collect():
        for task, slope in slopes.items():
            balancer.backward({task: w @ slope}, shared=[w])
    assert balancer.report.conflicts == 1
    expected = torch.zeros(2, requires_grad=True)
    Balancer(("math", "code"), gradient="pcgrad").backward({t: expected @ s for t, s in slopes.items()}, shared=[expected])
    torch.testing.assert_close(w.grad, expected.grad)
    assert not torch.allclose(w.grad, torch.tensor([0.0, 0.4]))  # the plain sum, which separate calls would give


def test_the_graph_of_a_micro_batch_is_freed():
    network, balancer = Network(), Balancer(TASKS, gradient="mgda")
    graphs = []
    with balancer.collect():
        for task in TASKS:
            losses, _, z = losses_of(network, ALL)
            balancer.backward({task: losses[task]}, shared=network.shared())
            graphs.append(weakref.ref(z))
            del losses, z
            gc.collect()
            assert graphs[-1]() is None
        assert all(p.grad is None for p in network.parameters())
    assert all(p.grad is not None for p in network.parameters())


def test_reports_of_calls_have_no_weights():
    network, balancer = Network(), Balancer(TASKS, gradient="mgda")
    with balancer.collect():
        report = balancer.backward(network.losses(), shared=network.shared())
        assert report.gradient_weights.isnan().all()
        assert balancer.report is None
    assert balancer.report.gradient_weights.isfinite().all()


def test_an_error_in_the_body_leaves_everything_as_it_was():
    network, balancer = Network(), Balancer(TASKS, loss="uw", gradient="pcgrad")
    before = {name: value.clone() for name, value in balancer.state_dict().items()}
    with pytest.raises(KeyError, match="reader"), balancer.collect():
        balancer.backward(network.losses(), shared=network.shared())
        raise KeyError("reader")
    assert all(p.grad is None for p in network.parameters())
    assert_same_state(dict(balancer.state_dict()), before)
    balancer.backward(network.losses(), shared=network.shared())  # the collection is closed


@pytest.mark.parametrize("gradient", [None, "nashmtl"])
def test_a_loss_that_is_not_finite(gradient):
    network, balancer = Network(), Balancer(TASKS, gradient=gradient)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def collect(**keywords):
        with balancer.collect():
            balancer.backward({"a": network.losses()["a"]}, shared=network.shared(), **keywords)
            balancer.backward({"b": network.losses()["b"] * torch.inf}, shared=network.shared(), **keywords)

    with pytest.raises(ValueError, match=r"Losses must be finite, but got \{'b': inf\}"):
        collect()
    assert all(p.grad is None for p in network.parameters())
    collect(scaler=scaler)
    optimizer, before = torch.optim.SGD(network.parameters(), lr=1.0), [p.detach().clone() for p in network.parameters()]
    scaler.step(optimizer)
    assert all(map(torch.equal, network.parameters(), before))


def test_a_scaler_scales_the_gradients():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled, _, _ = train({"gradient": "cagrad", "loss": "uw"}, PARTS["mixed"], steps=1, scaler=scaler)
    plain, _, _ = train({"gradient": "cagrad", "loss": "uw"}, PARTS["mixed"], steps=1)
    assert_same(scaled[0], {name: 8 * g for name, g in plain[0].items()}, rtol=1e-9, atol=1e-12)


def test_extra_losses_are_averaged_over_the_calls():
    network, balancer = double(), Balancer(TASKS, gradient="mgda")
    with balancer.collect():
        for rows, factor in zip(PARTS["equal"], (1.0, 2.0, 3.0, 6.0), strict=True):
            losses, counts, z = losses_of(network, rows)
            balancer.backward(losses, shared=network.shared(), counts=counts, extra=factor * z.square().mean())
    other = double()
    losses, _, z = losses_of(other, ALL)
    Balancer(TASKS, gradient="mgda").backward(losses, shared=other.shared(), extra=3.0 * z.square().mean())
    assert_same(network.grads(), other.grads(), rtol=1e-9, atol=1e-12)


def test_sparse_gradients_stay_sparse():
    table, head = nn.Embedding(9, 3, sparse=True), nn.Linear(3, 2)
    balancer = Balancer(2, gradient="mgda")
    with balancer.collect():
        for i in (1, 4):
            out = head(table(torch.tensor([i, 2]))).square().mean(0)
            balancer.backward({"0": out[0], "1": out[1]}, shared=table.parameters())
    assert table.weight.grad.is_sparse
    assert table.weight.grad.coalesce().indices().flatten().tolist() == [1, 2, 4]


def test_weights_are_reused_over_collections():
    rule = balance.compose.every(2, "mgda", len(TASKS))
    network, balancer = double(), Balancer(TASKS, gradient=rule)
    weights = []
    for scale in (1.0, 5.0):
        with balancer.collect():
            for rows in PARTS["one task each"]:
                losses, counts, _ = losses_of(network, rows)
                losses = {t: loss * (scale if t == "a" else 1.0) for t, loss in losses.items()}
                balancer.backward(losses, shared=network.shared(), counts=counts)
        weights.append(balancer.report.gradient_weights)
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize(
    ("options", "keywords", "message"),
    [
        ({}, {"factor": 0.5}, "Use collect\\(factor=...\\)"),
        ({"gradient": "mgda"}, {"measure": True}, "keeps the gradients of all shared parameters anyway"),
        ({"gradient": "graddrop", "source": "features"}, {}, "needs all samples in one graph"),
        ({"gradient": "mgda"}, {"shared": "fewer"}, "same parameters in all calls"),
        ({}, {"losses": {}}, "must have at least one of the tasks"),
    ],
)
def test_refusals(options, keywords, message):
    network, balancer = Network(), Balancer(TASKS, **options)
    losses, _, z = losses_of(network, ALL)
    shared = list(network.shared())
    given = {"losses": losses, "shared": shared, "features": z} | keywords
    if "measure" in keywords:
        given["measure"] = shared[:1]
    with pytest.raises(ValueError, match=message), balancer.collect():
        if keywords.get("shared") == "fewer":
            balancer.backward(losses_of(network, ALL)[0], shared=shared)
            given["shared"] = shared[:1]
        balancer.backward(**given)
    assert all(p.grad is None for p in network.parameters())


def test_a_call_that_failed_half_way_is_not_forgotten():
    network, balancer = Network(), Balancer(TASKS)
    broken = network.losses()
    broken["b"].backward()  # frees the graph that the pass of the second task needs
    context = balancer.collect()
    context.__enter__()
    with pytest.raises(RuntimeError, match="second time"):
        balancer.backward(broken)
    with pytest.raises(RuntimeError, match="lack some of its gradients"):
        context.__exit__(None, None, None)
    assert balancer.report is None


def test_an_empty_or_second_collection_is_refused():
    balancer = Balancer(TASKS)
    with pytest.raises(ValueError, match="must have at least one of the tasks"), balancer.collect():
        pass
    with balancer.collect():
        with pytest.raises(RuntimeError, match="open already"), balancer.collect():
            pass
        balancer.backward(Network().losses())
    with pytest.raises(ValueError, match="factor must be a positive number"):
        balancer.collect(factor=0.0).__enter__()


def test_the_scale_must_not_change_within_a_collection():
    network, balancer = Network(), Balancer(TASKS)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with pytest.raises(ValueError, match=r"one scale of mixed precision, but got 8\.0 and 1\.0"), balancer.collect():
        balancer.backward(network.losses(), scaler=scaler)
        balancer.backward(network.losses())
