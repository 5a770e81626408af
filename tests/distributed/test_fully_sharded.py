"""Parameters that FSDP2 shards: a balancer makes the same steps as one process with the whole batch."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from balance import Balancer
from tests.distributed.processes import run_on_ranks

TASKS = ("a", "b")
BALANCERS = (
    {"gradient": "nashmtl"},
    {"gradient": "mgda", "loss": "famo"},
    {"gradient": "pcgrad", "loss": "go4align"},
    {"gradient": "cagrad", "loss": "uw"},
    {"gradient": "mgda", "in_metric": True},
    {"loss": "uw"},
    {},
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh())
        self.a, self.b = nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, x):
        z = self.trunk(x)
        return {"a": self.a(z), "b": self.b(z)}, z


def shard(model, mesh=None, **options):
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),)) if mesh is None else mesh
    for module in (model.trunk[0], model.trunk[2], model.a, model.b):
        fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def task_losses(outputs, x, rows):
    difference = outputs["b"] - x.sum(1, keepdim=True)
    return {"a": (outputs["a"] - 0.3).square().mean(), "b": 5 * difference[rows].square().mean()}


def train(options, rows, steps=3, sharded=False, absent=(), listed_late=False, partial=None, **fsdp):
    """Parameters and weights of some steps on the given rows of every batch.

    ``absent``: steps at which task b has no samples; ``partial``: by step, the samples that task b has.
    """
    torch.manual_seed(0)
    model = Net().double()
    if sharded:
        shard(model, **fsdp)
    in_metric = options.get("in_metric", False)
    balancer = Balancer(TASKS, **{key: value for key, value in options.items() if key != "in_metric"})
    shared, parameters, weights = list(model.trunk.parameters()), list(model.parameters()), []
    optimizer = torch.optim.Adam([*parameters, *balancer.parameters()], lr=0.05)
    balancer.metric = optimizer if in_metric else None
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(24, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)[rows]
        outputs, _ = model(x)
        losses = task_losses(outputs, x, (partial or {}).get(step, slice(None)))
        counts = dict.fromkeys(TASKS, len(x))
        if step in absent:
            losses["b"], counts["b"] = (outputs["b"] * 0).sum(), 0
        given = model.trunk.parameters() if listed_late else shared
        report = balancer.backward(losses, shared=given, counts=counts)
        weights.append(report.gradient_weights.double())
        optimizer.step()
        if balancer.needs_observation:
            with torch.no_grad():
                values = task_losses(model(x)[0], x, (partial or {}).get(step, slice(None)))
                balancer.observe(values, counts=counts)
    full = [p.full_tensor() if sharded else p for p in parameters]
    return [p.detach().clone() for p in full], weights


def refusals():
    """Messages of everything that is not available."""
    model = shard(Net().double())
    messages = []
    for options, keywords in (
        ({"source": "features", "gradient": "mgda"}, {"features": True}),
        ({"gradient": "graddrop"}, {}),
        ({"gradient": "mgda"}, {"extra": True}),
        ({"gradient": "mgda"}, {"only": "a"}),
    ):
        outputs, z = model(torch.ones(4, 5, dtype=torch.float64))
        losses = {task: output.square().mean() for task, output in outputs.items()}
        given = {"features": z} if "features" in keywords else {}
        if "extra" in keywords:
            given["extra"] = z.sum()
        if "only" in keywords and torch.distributed.get_rank():
            del losses["b"]
        try:
            Balancer(TASKS, **options).backward(losses, shared=list(model.trunk.parameters()), **given)
            messages.append("accepted")
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def on_rank(rank, everything):
    equal, unequal = slice(12 * rank, 12 * rank + 12), slice(0, 17) if rank == 0 else slice(17, 24)
    results = {("equal", i): train(options, equal, sharded=True) for i, options in enumerate(BALANCERS)}
    if everything:
        for i, options in enumerate(BALANCERS):
            results["unequal", i] = train(options, unequal, sharded=True)
            results["absent", i] = train(options, equal, sharded=True, absent=(1,) if rank else ())
            results["kept", i] = train(options, equal, sharded=True, reshard_after_forward=False)
            results["late", i] = train(options, equal, sharded=True, listed_late=True)
            results["replicas", i] = train(
                options, equal, sharded=True, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("r", "s"))
            )
    results["refused"] = refusals()
    return results


def check(folder, everything):
    ranks = run_on_ranks(on_rank, 2, folder, everything)
    refused = [results.pop("refused") for results in ranks]
    for key, (parameters, weights) in ranks[0].items():
        kind, i = key
        others, weights_there = ranks[1][key]
        assert all(map(torch.equal, parameters, others)), key
        assert all(map(torch.equal, weights, weights_there)), key
        if kind == "absent":  # step 1 has the samples of rank 0 only for task b
            alone, weights_alone = train(BALANCERS[i], slice(0, 24), partial={1: slice(0, 12)})
        else:
            alone, weights_alone = train(BALANCERS[i], slice(0, 24))
        torch.testing.assert_close(parameters, alone, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
        torch.testing.assert_close(weights, weights_alone, rtol=1e-9, atol=1e-12)
    assert refused[0] == refused[1]
    features, jacobian, extra, absent = refused[0]
    assert 'source="features" cannot be combined' in features
    assert "sees the Jacobian cannot be combined" in jacobian
    assert "extra= cannot be combined" in extra
    assert "give a loss without samples" in absent


@pytest.mark.slow
def test_every_way_to_shard(tmp_path):
    check(tmp_path, everything=True)
