import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from balance import Splitter
from tests.splitter.views import TASKS, Network, assert_same, data, gradients, merged, splitter_of, tensors

DISTRIBUTED = [{}, {"projection": 3}, {"projection": 1, "weights": (1, 2, 3)}, {"gradient": "pcgrad"}, {"gradient": "nashmtl"}]


def train(network, model, batches):
    """Three steps; the weights of the first."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    weights = None
    for x in batches:
        optimizer.zero_grad()
        sum((y - i).square().mean() * 10**i for i, y in enumerate(model(x).values())).backward()
        optimizer.step()
        weights = network.splitter.report.gradient_weights if weights is None else weights
    return {"weights": weights, "state": network.state_dict()}


def run_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = []
    for mode in DISTRIBUTED:
        network = Network(splitter_of(TASKS, mode))
        half = slice(8 * rank, 8 * rank + 8)
        results.append(train(network, DistributedDataParallel(network), [data(t)[half] for t in range(3)]))
    try:
        merged(Splitter(2, gradient="graddrop"), gradients(0, 2))
    except RuntimeError as error:
        results.append(str(error))
    # a task that one rank alone has seen is present everywhere
    J = gradients(rank, 2)
    results.append((merged(Splitter(2, gradient="mgda"), [J[0], J[1] if rank else None]), J))
    # what is not finite on one rank stops all
    splitter = Splitter(2)
    results.append((merged(splitter, J * (math.inf if rank else 1)), splitter.counts))
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for mode, first, second in zip(DISTRIBUTED, *ranks, strict=False):
        network = Network(splitter_of(TASKS, mode))
        alone = train(network, network, [data(t) for t in range(3)])
        assert_same(tensors(first["state"]), tensors(alone["state"]), rtol=1e-9, atol=1e-12)
        assert_same(tensors(first["state"]), tensors(second["state"]), rtol=0, atol=0)
        if first["weights"] is not None:
            assert first["weights"].tolist() == second["weights"].tolist()
            torch.testing.assert_close(first["weights"], alone["weights"])
    refusal, (left, J), (direction, counts) = ranks[0][-3:]
    assert "torch.distributed runs 2" in refusal
    assert direction.isnan().all()
    assert counts.tolist() == [0, 0]
    right, Q = ranks[1][-2]
    whole = torch.cat([torch.stack([J[0], torch.zeros_like(J[0])]), Q], dim=1) / 2  # each rank's loss counts half
    torch.testing.assert_close(torch.cat([left, right]) / 2, merged(Splitter(2, gradient="mgda"), whole))
