"""DistributedDataParallel around a network, and parameters that FSDP2 shards."""

import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from balance import Balancer


@pytest.fixture
def one_process(monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.destroy_process_group()


class Returning(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 2)

    def forward(self, x):
        z = self.trunk(x)
        return self.a(z), self.b(z), z


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrap", [{}, {"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}]
)
def test_distributed_data_parallel_with_one_process(one_process, wrap):
    for options in ({}, {"memory": "gramian"}, {"source": "features"}):
        results = []
        for parallel in (False, True):
            torch.manual_seed(0)
            inner = Returning()
            model = nn.parallel.DistributedDataParallel(inner, **wrap) if parallel else inner
            balancer, optimizer = Balancer(("a", "b"), gradient="mgda", **options), torch.optim.SGD(inner.parameters(), 0.1)
            for _ in range(3):
                optimizer.zero_grad()
                a, b, z = model(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))
                losses = {"a": a.square().mean(), "b": (b - 1).square().mean()}
                if (
                    parallel
                    and options == {"source": "features"}
                    and (wrap.keys() & {"static_graph", "find_unused_parameters"})
                ):
                    with pytest.raises(ValueError, match="DistributedDataParallel returns copies"):
                        balancer.backward(losses, shared=inner.trunk.parameters(), features=z)
                    return
                balancer.backward(losses, shared=inner.trunk.parameters(), features=z)
                optimizer.step()
            results.append([p.detach().clone() for p in inner.parameters()])
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.slow
def test_sharded_parameters_of_one_process(tmp_path):
    program = tmp_path / "sharded.py"
    program.write_text(
        textwrap.dedent("""
        import torch, balance, torch.distributed as dist
        from torch import nn
        from torch.distributed.fsdp import fully_shard
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        for source, given, which in (
            ("features", True, "all"), ("features", False, "all"), ("parameters", True, "all"), ("features", False, "trunk")
        ):
            trunk, heads = nn.Linear(4, 8), nn.ModuleDict({"a": nn.Linear(8, 1), "b": nn.Linear(8, 1)})
            model = nn.ModuleList([trunk, heads])
            fully_shard(trunk), [fully_shard(h) for h in heads.values() if which == "all"]
            shared = list(trunk.parameters())
            z = trunk(torch.randn(16, 4))
            losses = {t: (h(z) - k).square().mean() for k, (t, h) in enumerate(heads.items())}
            try:
                balance.Balancer(("a", "b"), gradient="nashmtl", source=source).backward(
                    losses, shared=shared if given else None, features=z if source == "features" else None)
                print("accepted")
            except (TypeError, RuntimeError) as error:
                print("refused", "sharded" in str(error))
                assert all(p.grad is None for p in model.parameters())
        results = []
        for sharded in (False, True):
            torch.manual_seed(0)
            model = nn.ModuleDict({"trunk": nn.Linear(4, 8), "a": nn.Linear(8, 1), "b": nn.Linear(8, 1)})
            if sharded:
                [fully_shard(module) for module in model.values()]
            views = balance.Splitter(("a", "b"), gradient="nashmtl")(model["trunk"](torch.ones(16, 4)))
            sum((model[t](views[t]) - k).square().mean() for k, t in enumerate("ab")).backward()
            results.append([p.grad.to_local() if sharded else p.grad for p in model.parameters()])
        print("splitter", all(torch.allclose(a, b) for a, b in zip(*results)))
        losses = {t: (h(trunk(torch.ones(16, 4))) - k).square().mean() for k, (t, h) in enumerate(heads.items())}
        balance.Balancer(("a", "b"), loss="uw").backward(losses, shared=shared)
        print("plain", all(p.grad is not None for p in model.parameters()))
        """)
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        *["refused True"] * 2,
        "accepted",
        "refused True",
        "splitter True",
        "plain True",
    ], done.stdout + done.stderr
