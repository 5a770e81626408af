"""One step of the published networks, with their sizes and losses computed anew."""

import numpy as np
import pytest
import torch

from experiments.training.step import build_optimizer, train_step
from tests.experiments.short_runs import prepare


def of_pixels(values, counted):
    return values[counted].mean()


def dense_losses(outputs, batch):
    _, label, depth, *normals = batch
    b, y, x = np.nonzero(label >= 0)
    found = {
        "segmentation": -outputs["segmentation"][b, label[b, y, x], y, x].mean(),
        "depth": of_pixels(np.abs(outputs["depth"] - depth), depth != 0),
    }
    for normal in normals:
        found["normals"] = 1 - of_pixels((outputs["normals"] * normal).sum(1), (normal != 0).any(1))
    return found


def log_softmax(scores):
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


OFFICIAL = {  # words, parameters, losses of outputs and batch as arrays of float64
    "nyuv2": (["model.name=mtan"], 44_229_073, dense_losses),
    "cityscapes": (["model.name=segnet"], 25_017_672, dense_losses),
    "celeba": (
        ["model.name=official"],
        5_197_160,
        lambda outputs, batch: {
            task: np.mean(np.log1p(np.exp(answer)) - answer * batch[1][:, k])
            for k, (task, answer) in enumerate(outputs.items())
        },
    ),
    "quantum_chemistry": (
        ["model.dim=64"],
        617_675,
        lambda outputs, batch: {
            task: np.mean((answer - batch[1][:, k]) ** 2) for k, (task, answer) in enumerate(outputs.items())
        },
    ),
    "multimnist": (  # smoothed labels; log-probabilities once more made into log-probabilities are the same
        ["model.name=demo", "train.batch_size=8", "data.imbalance=1000"],
        121_120 + 2 * 34_314,
        lambda outputs, batch: {
            "left": -np.mean((batch[1] * log_softmax(outputs["left"])).sum(1)),
            "right": -1000 * np.mean((batch[2] * log_softmax(outputs["right"])).sum(1)),
        },
    ),
}


def arrays(value):
    return value.double().numpy() if value.is_floating_point() else value.numpy()


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_step_of_the_official_network(name, tiny, on_disk):
    words, parameters, expected = OFFICIAL[name]
    run = prepare(*(on_disk if name == "multimnist" else tiny)(name, *words, "train.max_norm=1"))
    assert sum(value.numel() for value in run.model.parameters()) == parameters
    batch = next(iter(run.batches))
    with torch.no_grad():
        outputs = {task: arrays(answer) for task, answer in run.model(batch[0]).items()}
    before = [value.detach().clone() for value in run.model.parameters()]
    optimizer = build_optimizer(run)
    report = train_step(run, optimizer, batch)
    graphs = name == "quantum_chemistry"
    losses = expected(outputs, [None if graphs and part is batch[0] else arrays(part) for part in batch])
    assert dict(zip(run.problem.TASKS, report.losses.tolist(), strict=True)) == pytest.approx(losses, rel=1e-4)
    gradients = [value.grad for value in run.model.parameters()]
    assert torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])) <= 1 + 1e-5
    lr = run.config.train.lr
    for old, new, gradient in zip(before, run.model.parameters(), gradients, strict=True):  # the first step of Adam
        torch.testing.assert_close(new.detach(), old - lr * gradient / (gradient.abs() + 1e-8), rtol=1e-4, atol=1e-3 * lr)
