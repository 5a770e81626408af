"""A small network trained on one process or several, with batches that the ranks share in different ways."""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from balance import Balancer

TASKS = ("a", "b", "c")


class Net(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh())
        self.a, self.b, self.c = nn.Linear(6, 2), nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)), nn.Linear(6, 3)
        self.unused = nn.Linear(2, 2)
        self.checkpointed = checkpointed

    def forward(self, x, tasks=TASKS):
        z = checkpoint(self.trunk, x, use_reentrant=False) if self.checkpointed else self.trunk(x)
        return z, {task: self.get_submodule(task)(z) for task in tasks}


@dataclass
class Case:
    """A way to train.

    Attributes:
        balancer: Options of the balancer.
        wrap: Options of DistributedDataParallel; None: the plain module.
        batches: ``"equal"`` parts of the batch, ``"unequal"`` ones, tasks ``"alternating"`` or ``"disjoint"`` over ranks.
        inner: Whether the forward pass goes through the module inside of the wrapper.
        checkpointed: Whether the trunk recomputes its activations.
        collect: Number of micro-batches of a step, inside of collect().
        arguments: Further arguments of backward: "measure", "extra"; or "metric", the metric of the optimizer.
    """

    balancer: dict
    wrap: dict | None = field(default_factory=dict)
    batches: str = "equal"
    inner: bool = False
    checkpointed: bool = False
    collect: int = 0
    arguments: tuple = ()
    dtype: torch.dtype = torch.float64


def samples_of(case, step, rank, ranks):
    """Rows of the batch of one step, by task, that a rank trains on."""
    rows = torch.arange(24)
    if case.batches == "unequal":
        parts = torch.tensor_split(rows, [24 * (r + 2) // (ranks + 3) for r in range(ranks - 1)])
    else:
        parts = torch.tensor_split(rows, ranks)
    own = dict.fromkeys(TASKS, parts[rank])
    if case.batches == "alternating" and ranks > 1 and (step + rank) % ranks == 0:
        own["b"] = rows[:0]
    if case.batches == "disjoint":
        own = {task: parts[rank] if k % ranks == rank else rows[:0] for k, task in enumerate(TASKS)}
    return own


def whole_batch(case, step, ranks):
    """Rows by task that all ranks together train on."""
    by_rank = [samples_of(case, step, rank, ranks) for rank in range(ranks)]
    return {task: torch.cat([own[task] for own in by_rank]) for task in TASKS}


def losses_of(model, x, rows):
    """Mean losses by task of the tasks that have rows, their numbers of rows, and the features."""
    present = tuple(task for task in TASKS if len(rows[task]))
    z, outputs = model(x, present)
    targets = {"a": 0.3, "b": x.sum(1, keepdim=True), "c": 1.0}
    losses = {}
    for task in present:
        target = targets[task] if isinstance(targets[task], float) else targets[task][rows[task]]
        losses[task] = (outputs[task][rows[task]] - target).square().mean() * 3 ** TASKS.index(task)
    return losses, {task: len(rows[task]) for task in present}, z


def micro_batches(case, rows):
    """Parts of the rows of one rank, the first of one task only."""
    if not case.collect:
        return [rows]
    parts = [{task: own[i :: case.collect] for task, own in rows.items()} for i in range(case.collect)]
    moved = dict(parts[0], a=rows["a"][:0]), dict(parts[1], a=torch.cat([parts[0]["a"], parts[1]["a"]]))
    return [part for part in (*moved, *parts[2:]) if any(len(own) for own in part.values())]


def backward(balancer, model, inner, case, x, rows, ranks):
    losses, counts, z = losses_of(model, x, rows)
    keywords = {"features": z} if case.balancer.get("source") == "features" else {}
    if "measure" in case.arguments:
        keywords["measure"] = inner.trunk[2].parameters()
    if "extra" in case.arguments:
        keywords["extra"] = 0.1 * sum(p.square().sum() for p in inner.trunk.parameters())
    return balancer.backward(losses, shared=inner.trunk.parameters(), counts=counts, **keywords)


def train(case, rank=0, ranks=1, steps=3, share=None):
    """Losses, weights, gradients and parameters of some steps. ``share``: number of ranks whose batches one process takes."""
    torch.manual_seed(0)
    inner = Net(case.checkpointed).to(case.dtype)
    model = inner if case.wrap is None or ranks == 1 else DistributedDataParallel(inner, **case.wrap)
    used = inner if case.inner else model
    balancer = Balancer(TASKS, **case.balancer)
    optimizer = torch.optim.Adam([*inner.parameters(), *balancer.parameters()], lr=0.05)
    balancer.metric = optimizer if "metric" in case.arguments else None
    reports = []
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(24, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(case.dtype)
        rows = whole_batch(case, step, share) if share else samples_of(case, step, rank, ranks)
        if case.collect:
            with balancer.collect():
                for part in micro_batches(case, rows):
                    backward(balancer, used, inner, case, x, part, ranks)
        else:
            backward(balancer, used, inner, case, x, rows, ranks)
        report = balancer.report
        reports.append(
            (
                report.losses.double(),
                report.gradient_weights,
                [None if p.grad is None else p.grad.clone() for p in inner.parameters()],
            )
        )
        optimizer.step()
        if balancer.needs_observation:
            with torch.no_grad():
                losses, counts, _ = losses_of(inner, x, rows)
                balancer.observe(losses, counts=counts)
        if balancer.needs_validation:
            with torch.no_grad():
                losses, counts, _ = losses_of(inner, x, rows)
                balancer.observe_validation(losses, counts=counts)
        balancer.end_epoch()
    return {
        "reports": reports,
        "parameters": [p.detach().clone() for p in inner.parameters()],
        "state": dict(balancer.state_dict()),
    }


def run_cases(rank, cases, ranks):
    """Results of all cases on one rank; an error by its message."""
    results = []
    for case in cases:
        try:
            results.append(train(case, rank, ranks))
        except (RuntimeError, ValueError) as error:
            results.append(f"{type(error).__name__}: {error}")
    return results
