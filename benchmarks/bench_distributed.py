"""Cost of a balanced step on two processes, relative to an ordinary step of DistributedDataParallel.

python benchmarks/bench_distributed.py [--tasks 3 11] [--turns 15] [--output benchmarks/results]

The processes share one machine (gloo, loopback, one thread each), so that only ratios within a run mean anything.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import record
import torch
from networks import Network
from timing import summaries
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from balance import Balancer
from balance.solvers.min_norm import min_norm_weights

if TYPE_CHECKING:
    from collections.abc import Callable

RANKS, BATCH = 2, 64
PLAIN = "plain DDP"


def build(num_tasks: int) -> Network:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 800))
    return Network(trunk, torch.randn(BATCH, 256), 800, num_tasks)


def all_reduced_jacobian(network: Network, losses: list[torch.Tensor]) -> None:
    """Sum the gradients of all tasks over ranks, then solve on every rank: the textbook way."""
    trunk = list(network.trunk.parameters())
    K = len(losses)
    parameters = [*trunk, *network.heads.parameters()]
    rows = [
        torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, gradients, strict=True)])
        for gradients in (
            torch.autograd.grad(loss / RANKS, parameters, retain_graph=k < K - 1, allow_unused=True)
            for k, loss in enumerate(losses)
        )
    ]
    J = torch.stack(rows)
    distributed.all_reduce(J)
    P = sum(p.numel() for p in trunk)
    G = J[:, :P].double() @ J[:, :P].double().T
    direction = torch.from_numpy(min_norm_weights(G.numpy())).to(J) @ J
    for p, piece in zip(parameters, torch.split(direction, [p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)


def steps_of(num_tasks: int) -> tuple[Network, dict[str, Callable[[], object]]]:
    network = build(num_tasks)
    model = DistributedDataParallel(network)
    trunk = list(network.trunk.parameters())

    def balanced(**options: str) -> Callable[[], object]:
        balancer = Balancer(num_tasks, **options)

        def step() -> None:
            features, losses = model()
            keywords = {"features": features} if "source" in options else {}
            balancer.backward(torch.stack(losses), shared=trunk, **keywords)

        return step

    return network, {
        PLAIN: lambda: torch.stack(model()[1]).sum().backward(),
        "Balancer(loss='uw')": balanced(loss="uw"),
        "Balancer(gradient='mgda')": balanced(gradient="mgda"),
        "memory='gramian'": balanced(gradient="mgda", memory="gramian"),
        "source='features'": balanced(gradient="mgda", source="features"),
        "all-reduce of K gradients": lambda: all_reduced_jacobian(network, model()[1]),
    }


def run(rank: int, meeting: str, tasks: list[int], turns: int, file: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    results = {}
    for K in tasks:
        network, steps = steps_of(K)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(turns + 2):
            for name, step in steps.items():
                network.zero_grad()
                distributed.barrier()
                begin = time.perf_counter()
                step()
                distributed.barrier()
                if turn >= 2:
                    times[name].append(1e3 * (time.perf_counter() - begin))
        results[f"K = {K}"] = summaries(times, PLAIN)
    if rank == 0:
        torch.save(results, file)
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[3, 11])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/results.pt"
        torch.multiprocessing.spawn(run, (f"{folder}/meeting", arguments.tasks, arguments.turns, file), nprocs=RANKS)
        results = torch.load(file)
    for title, rows in results.items():
        print(f"\n{title}")
        for name, row in rows.items():
            print(f"  {name:28s} {row['ms']:8.1f} ms   {row['ratio']:6.2f} x")
    record.write(results, "distributed", arguments.output)


if __name__ == "__main__":
    main()
