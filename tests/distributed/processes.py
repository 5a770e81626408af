"""Functions that run on several processes of this machine, joined by gloo."""

import datetime

import torch
from torch import distributed


def run_on_ranks(function, count, folder, *arguments):
    """Call ``function(rank, *arguments)`` on every rank; its results by rank, as torch.save keeps them."""
    torch.multiprocessing.spawn(_run_rank, args=(function, count, str(folder), arguments), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _run_rank(rank, function, count, folder, arguments):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count, timeout=timeout)
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
