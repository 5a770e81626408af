"""Lightning on two processes, next to one process with the whole batch."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from balance import Balancer
from tests.distributed.processes import run_on_ranks

WRAPPERS = {"default": {}, "unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}
ON_RANKS = {"uw": {"loss": "uw"}, "uw+cagrad": {"loss": "uw", "gradient": "cagrad"}, "famo": {"loss": "famo"}}


def manual_module(runs, options):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.balancer.backward(self.task_losses(batch), shared=self.trunk.parameters())
        optimizer.step()

    module = runs.module_with(options, plain=True, training_step=training_step)
    module.automatic_optimization = False
    return module


def fit_on_ranks(rank, folder):
    """States after fits on this rank, by case; an error by its message."""
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE="2", NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    from lightning.pytorch.strategies import DDPStrategy

    from tests.integrations import lightning_runs as runs

    def fit(module, *callbacks, wrapper="default", **chosen):
        batches = runs.Batches(dtype=torch.float64, part=slice(6 * rank, 6 * rank + 6))
        strategy = DDPStrategy(process_group_backend="gloo", **WRAPPERS[wrapper])
        given = {"module": module, "batches": batches, "strategy": strategy, "devices": 2}
        try:
            fitted = runs.fit(folder, None, *callbacks, **given, **chosen)
        except (RuntimeError, ValueError) as error:
            return str(error)
        return dict(fitted.state_dict())

    results = {}
    for wrapper in WRAPPERS:
        for pair, options in ON_RANKS.items():
            results[wrapper, pair, 1] = fit(runs.Module(options, plain=True), wrapper=wrapper)
            results[wrapper, pair, 2] = fit(runs.Module(options, plain=True), wrapper=wrapper, accumulate=2)
            results[wrapper, pair, "manual"] = fit(manual_module(runs, options), wrapper=wrapper)
    added = runs.module_with({"gradient": "mgda"}, plain=True, training_step=with_a_regulariser)
    results["added"] = fit(added)
    late = runs.module_with({}, plain=True, setup=lambda self, stage: setattr(self, "balancer", Balancer(3)))
    late.balancer = torch.nn.Identity()
    results["late"] = fit(late)
    results["without"] = fit(runs.Module({"loss": "uw"}, plain=True), runs.saving(folder))
    return results


def with_a_regulariser(self, batch, batch_idx):
    return self.balancer.loss(self.task_losses(batch), shared=self.trunk.parameters()) + self.trunk[0].weight.square().sum()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path):
    pytest.importorskip("lightning")
    from tests.integrations import lightning_runs as runs

    first, second = run_on_ranks(fit_on_ranks, 2, tmp_path, str(tmp_path))
    assert "Use balancer.loss(..., extra=...)" in first.pop("added")
    assert "Create it in __init__" in first.pop("late")
    assert "BalanceCallback" in first.pop("without")
    for case in [(wrapper, pair, 2) for wrapper, pair in [("static", pair) for pair in ON_RANKS]]:
        assert "PyTorch cannot accumulate gradients with static_graph=True" in first.pop(case)
    for (wrapper, pair, kind), state in first.items():
        module, batches = runs.Module(ON_RANKS[pair], plain=True), runs.Batches(dtype=torch.float64)
        by_hand = runs.fit_by_hand(None, module=module, batches=batches, accumulate=kind if kind == 2 else 1)
        as_module = [SimpleNamespace(state_dict=lambda state=state: state) for state in (state, second[wrapper, pair, kind])]
        assert runs.largest_difference(*as_module) == 0, (wrapper, pair, kind)
        assert runs.largest_difference(as_module[0], by_hand) < 1e-12, (wrapper, pair, kind)
