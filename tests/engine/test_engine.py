"""All engines compute equal gradients, whatever passes they run."""

import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from balance import Balancer
from balance.engine import engine as engine_module
from balance.engine.batching import Batching
from balance.engine.graph import trace
from balance.engine.partition import partition_graph
from tests.engine.definition import WAYS, Opaque, assert_close, grads, in_proportion, many_losses, reference, rows
from tests.networks import NETWORKS, TASKS, Wide, named, network, thin_layer


@pytest.fixture(params=["one matrix", "by tensor"])
def storage(request, monkeypatch):
    """Ways to keep the gradients of a small network."""
    if request.param == "by tensor":
        monkeypatch.setattr(engine_module, "is_small", lambda *_, **__: False)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))
@pytest.mark.parametrize("hint", [False, True], ids=["", "features"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.usefixtures("storage")
def test_every_engine_computes_the_definition(name, hint, way):
    model = network(name)
    G, _ = reference(model)
    _, expected = reference(model, in_proportion(G))
    model.zero_grad()
    balancer = Balancer(TASKS, gradient=in_proportion, heads="unweighted", **way)
    z, losses = model.losses()
    report = balancer.backward(named(losses), shared=model.trunk.parameters(), features=z if hint else None)
    torch.testing.assert_close(report.gramian, G, rtol=1e-10, atol=1e-14)
    assert_close(model, expected, rtol=1e-9, atol=1e-13)
    for parameter in model.parameters():
        assert parameter.requires_grad or parameter.grad is None


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["mlp", "resnet", "transformer"])
def test_engines_agree_in_single_precision(name):
    results = []
    for way in WAYS:
        model = network(name, torch.float32)
        z, losses = model.losses()
        report = Balancer(TASKS, gradient="imtl", **way).backward(named(losses), shared=model.trunk.parameters(), features=z)
        results.append((report.gramian, grads(model)))
    for gramian, gradients in results[1:]:
        torch.testing.assert_close(gramian, results[0][0], rtol=2e-5, atol=1e-9)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][parameter], rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("memory", ["jacobian", "gramian"])
@pytest.mark.parametrize("name", NETWORKS)
def test_engine_equals_torchjd(name, memory):
    torchjd = pytest.importorskip("torchjd")
    from torchjd.aggregation import IMTLG
    from torchjd.autojac import jac_to_grad, mtl_backward

    assert torchjd is not None
    model, other = network(name), network(name)
    z, losses = model.losses()
    Balancer(TASKS, gradient="imtl", heads="unweighted", memory=memory).backward(
        named(losses), shared=model.trunk.parameters(), features=z
    )
    z, losses = other.losses()
    reached = [p for p in other.trunk.parameters() if p.requires_grad]
    reached = [p for p in reached if id(p) in {id(leaf) for leaf in trace(losses).leaves}]
    own = [[*head.parameters(), *(other.common.parameters() if k < 2 else ())] for k, head in enumerate(other.heads)]
    mtl_backward(losses, features=z, shared_params=reached, tasks_params=own)
    jac_to_grad(reached, IMTLG())
    theirs = grads(other)
    for parameter, gradient in grads(model).items():
        if gradient is None:
            assert theirs[parameter] is None
        else:
            torch.testing.assert_close(gradient, theirs[parameter], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("memory", ["jacobian", "gramian"])
def test_operation_that_cannot_be_batched_warns_once_and_runs_in_sequence(memory):
    results = []
    for engine in ("loop", "batched"):
        torch.manual_seed(0)
        layer, x = thin_layer()
        balancer = Balancer(2, gradient="mgda", engine=engine, memory=memory)
        for step in range(2):
            layer.zero_grad()
            z = Opaque.apply(layer(x))
            arguments = {"shared": layer.parameters(), "features": z}
            if engine == "batched" and step == 0:
                with pytest.warns(UserWarning, match="cannot be batched") as record:
                    balancer.backward(torch.stack(many_losses(z, 2)), **arguments)
                assert [warning.filename for warning in record] == [__file__]
            else:
                balancer.backward(torch.stack(many_losses(z, 2)), **arguments)
        results.append(layer.weight.grad)
    torch.testing.assert_close(*results)


def test_automatic_engine_is_batched_on_an_accelerator_with_few_activations():
    """Batched on an accelerator, if features are given and the trunk has more parameters than activations."""
    for batch, hint, device, expected in [(20, True, "cuda", True), (20, False, "cuda", False), (2000, True, "cuda", False)]:
        parts = parts_of(Wide(batch=batch), hint=hint)
        assert chosen("auto", parts, device) == expected
        assert chosen("batched", parts, device)
        assert not chosen("loop", parts, device)


@pytest.mark.parametrize(
    ("num_tasks", "batch", "hint", "expected"),
    [(8, 20, True, True), (7, 20, True, False), (8, 20, False, False), (8, 100, True, False)],
)
def test_automatic_engine_is_batched_on_a_cpu_with_many_tasks_and_small_operations(num_tasks, batch, hint, expected):
    assert chosen("auto", parts_of(Wide(batch=batch, num_tasks=num_tasks), hint=hint), "cpu", num_tasks) == expected


def test_automatic_engine_runs_functions_of_users_and_checkpoints_one_after_the_other():
    model = Wide(batch=4)
    z = checkpoint(model.trunk, model.x, use_reentrant=False)
    losses = [head(z).sum() for head in model.heads]
    assert not chosen("auto", partition_graph("parameters", losses, model.trunk.parameters(), z, None, []), "cpu")
    z = Opaque.apply(model.trunk(model.x))
    losses = [head(z).sum() for head in model.heads]
    assert not chosen("auto", partition_graph("parameters", losses, model.trunk.parameters(), z, None, []), "cpu")


def test_automatic_batches_warn_of_nothing_and_equal_the_loop():
    """Attention has no rule for batches, so torch runs its backward pass once for each task."""
    results = []
    for engine in ("loop", "auto"):
        torch.manual_seed(0)
        encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
        heads = [nn.Linear(8, 1, dtype=torch.float64) for _ in range(8)]
        balancer = Balancer(8, gradient="imtl", engine=engine)
        z = encoder(torch.randn(3, 4, 8, dtype=torch.float64)).mean(1)
        losses = {str(k): head(z).square().mean() for k, head in enumerate(heads)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            balancer.backward(losses, shared=encoder.parameters(), features=z)
        results.append([p.grad for module in (encoder, *heads) for p in module.parameters()])
    assert balancer.estimate(encoder.parameters()).passes == "batched"
    for batched, looped in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(batched, looped, rtol=1e-9, atol=1e-12)


def test_the_estimate_names_the_passes_of_the_last_step():
    model = Wide(batch=4)
    balancer = Balancer(8, gradient="mgda")
    assert balancer.estimate(model.trunk.parameters()).passes is None
    for hint, passes in [(False, "loop"), (True, "batched")]:
        z, losses = model.losses()
        balancer.backward(losses, shared=model.trunk.parameters(), features=z if hint else None)
        assert balancer.estimate(model.trunk.parameters()).passes == passes


def parts_of(model, *, hint):
    z, losses = model.losses()
    return partition_graph("parameters", list(losses.values()), model.trunk.parameters(), z if hint else None, None, [])


def chosen(choice, parts, device, num_tasks=8):
    return Batching(choice).is_chosen(SimpleNamespace(device=torch.device(device), num_tasks=num_tasks), parts)


def test_batched_pass_of_plain_layers_does_not_warn():
    model = network("mlp")
    z, losses = model.losses()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Balancer(TASKS, gradient="mgda", engine="batched").backward(named(losses), shared=model.trunk.parameters(), features=z)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))
@pytest.mark.parametrize("how", ["checkpoint", "compile"])
def test_engine_on_checkpointed_and_compiled_trunks(how, way):
    """Activations may be computed again, and operations may be hidden in one node."""
    results = []
    for wrap in (False, True):
        torch.manual_seed(0)
        trunk, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(4, 64)
        heads = [nn.Linear(64, 2) for _ in TASKS]
        if not wrap:
            z = trunk(x)
        elif how == "checkpoint":
            z = checkpoint(trunk, x, use_reentrant=False)
        else:
            z = torch.compile(trunk, backend="aot_eager")(x)
        losses = named([(k + 1) * head(z).square().mean() for k, head in enumerate(heads)])
        is_refused = wrap and how == "compile" and way["engine"] == "batched"  # by torch.vmap
        with pytest.warns(UserWarning, match="run one after the other") if is_refused else nullcontext():
            Balancer(TASKS, gradient="imtl", **way).backward(losses, shared=trunk.parameters(), features=z)
        results.append([p.grad for module in (trunk, *heads) for p in module.parameters()])
    for plain, wrapped in zip(*results, strict=True):
        torch.testing.assert_close(wrapped, plain)


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("hint", [False, True])
def test_measure_on_a_part_weighs_all_shared_parameters(engine, hint):
    model = network("mlp")
    last = list(model.trunk[6].parameters())
    losses = model.losses()[1]
    J = rows(losses, last)
    weights = in_proportion(J @ J.T)
    _, expected = reference(model, weights)
    model.zero_grad()
    visits = []

    def watch(module, inputs, output):
        output.register_hook(lambda _: visits.append(0))

    watched = model.trunk[0].register_forward_hook(watch)
    z, losses = model.losses()
    report = Balancer(TASKS, gradient=in_proportion, heads="unweighted", engine=engine).backward(
        named(losses), shared=model.trunk.parameters(), features=z if hint else None, measure=last
    )
    watched.remove()
    torch.testing.assert_close(report.gramian, J @ J.T)
    assert_close(model, expected)
    assert visits == [0]  # the passes of the tasks stopped before


def test_measure_on_everything_is_the_exact_step():
    results = []
    for measure in (False, True):
        model = network("resnet")
        _, losses = model.losses()
        shared = list(model.trunk.parameters())
        Balancer(TASKS, gradient="nashmtl").backward(named(losses), shared=shared, **({"measure": shared} if measure else {}))
        results.append(grads(model))
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-8, atol=1e-12)


def test_gradients_add_up_and_keep_the_scale():
    """Two steps add up, and a scale factor passes through."""
    for memory in ("jacobian", "gramian"):
        model = network("mlp")
        shared = list(model.trunk.parameters())
        balancer = Balancer(TASKS, gradient="pcgrad", memory=memory, seed=1)
        balancer.backward(named(model.losses()[1]), shared=shared)
        once = grads(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        balancer = Balancer(TASKS, gradient="pcgrad", memory=memory, seed=1)
        balancer.backward(named(model.losses()[1]), shared=shared, scaler=scaler)
        for name, gradient in grads(model).items():
            torch.testing.assert_close(gradient, 9 * once[name])
