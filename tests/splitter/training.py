"""A network with a splitter, trained on one process or several, with batches that the ranks share in different ways."""

import contextlib
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.splitter.views import TASKS, splitter_of

TINY = {"bucket_cap_mb": 1e-5}  # many collectives of the wrapper in each backward pass
UNUSED = {"find_unused_parameters": True, **TINY}


@dataclass(frozen=True)
class Case:
    """A way to train.

    Attributes:
        mode: Options of the splitter.
        wrap: Options of DistributedDataParallel; "shards": FSDP2.
        batches: Lengths: ``"equal"`` or ``"unequal"``. Ranks that lack task b: ``"absent"`` (one rank), ``"alternating"``,
            ``"nowhere"`` (all ranks). ``"disjoint"``: different tasks on each rank. ``"unlabelled"``: no task on one rank.
        accumulation: Whether gradients are reduced in the first of two micro-batches; None: one micro-batch.
        checkpointed: ``"trunk"``, ``"splitter"``, ``"reentrant"`` for the trunk, or
            ``"reentrant splitter"`` for trunk and splitter.
    """

    mode: dict = field(default_factory=dict)
    wrap: dict | str = field(default_factory=dict)
    batches: str = "equal"
    accumulation: str | None = None
    checkpointed: str = ""


class Net(nn.Module):
    """A trunk, a splitter, and a head for each task except "c", whose loss is on the features."""

    def __init__(self, mode, checkpointed=""):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 2), "b": nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))})
        self.heads["c"] = nn.Identity()
        self.splitter = splitter_of(TASKS, mode)
        self.checkpointed = checkpointed
        self.double()

    def forward(self, x, tasks=TASKS):
        if self.checkpointed == "reentrant splitter":
            views = checkpoint(lambda x: tuple(self.splitter(self.trunk(x)).values()), x.requires_grad_(), use_reentrant=True)
            return self.outputs(dict(zip(TASKS, views, strict=True)), tasks)
        if self.checkpointed == "splitter":
            return checkpoint(lambda z: self.outputs(self.splitter(self.trunk(z)), tasks), x, use_reentrant=False)
        if self.checkpointed:
            z = checkpoint(self.trunk, x.requires_grad_(), use_reentrant=self.checkpointed == "reentrant")
            return self.outputs(self.splitter(z), tasks)
        return self.outputs(self.splitter(self.trunk(x)), tasks)

    def outputs(self, views, tasks):
        return {task: self.heads[task](views[task]) for task in tasks} or {"none": views["a"] * 0}


def shares_of(batches, step):
    """Rows and tasks of the batch of one step, by rank."""
    parts = torch.arange(24).tensor_split([12 if batches == "equal" else 16])
    two = ("a", "c")
    tasks = {
        "absent": (TASKS, two),
        "alternating": (TASKS, two) if step % 2 else (two, TASKS),
        "nowhere": (two, two),
        "disjoint": (two, ("b",)),
        "unlabelled": (TASKS, ()),
    }.get(batches, (TASKS, TASKS))
    return list(zip(parts, tasks, strict=True))


def loss_of(outputs, rows, tasks):
    """The sum of the tasks' mean losses over some rows."""
    if not tasks:
        return outputs["none"].sum()
    return sum((outputs[task][rows] - k).square().mean() * 10**k for k, task in enumerate(TASKS) if task in tasks)


def total_loss(model, x, batches, step, rank):
    """The loss of one rank, or on one process (rank None) the mean of the losses of all ranks."""
    shares = shares_of(batches, step)
    if rank is not None:
        rows, tasks = shares[rank]
        return loss_of(model(x[rows], tasks), slice(None), tasks)
    present = tuple(task for task in TASKS if any(task in tasks for _, tasks in shares))
    outputs = model(x, present)
    return sum(loss_of(outputs, rows, tasks) for rows, tasks in shares if tasks) / len(shares)


def wrapped(network, wrap):
    if wrap != "shards":
        return DistributedDataParallel(network, **wrap)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in (network.trunk[0], network.trunk[2], network.heads["a"], network.heads["b"]):
        fully_shard(module, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def train(case, rank=None, steps=3):
    """Weights, parameters and state after some steps on one rank; on one process with the whole batch if rank is None."""
    network = Net(case.mode, case.checkpointed)
    model = network if rank is None else wrapped(network, case.wrap)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    num_micro = 1 if case.accumulation is None else 2
    weights = []
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(num_micro):
            x = torch.randn(24, 5, generator=torch.Generator().manual_seed(10 * step + micro), dtype=torch.float64)
            local = rank is not None and case.accumulation == "no_sync" and micro == 0
            with model.no_sync() if local else contextlib.nullcontext():
                (total_loss(model, x, case.batches, step, rank) / num_micro).backward()
        optimizer.step()
        weights.append(network.splitter.report.gradient_weights)
    parameters = [whole(p) for p in network.parameters()]
    return {"weights": weights, "parameters": parameters, "state": dict(network.splitter.state_dict())}


def whole(parameter):
    return parameter.full_tensor().clone() if hasattr(parameter, "full_tensor") else parameter.detach().clone()
