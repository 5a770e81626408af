import math

import numpy as np
import pytest
import torch

import balance
from experiments.problems import cityscapes, nyuv2
from experiments.problems.dense.losses import depth_loss, normal_loss, present, segmentation_loss
from experiments.problems.dense.masks import valid_normals

B, H, W, C = 2, 3, 4, 5


@pytest.fixture
def drawn():
    """Answers and targets, with pixels that do not count."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(B, C, H, W))
    normals = rng.normal(size=(2, B, 3, H, W))
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    labels, depth = rng.integers(0, C, (B, H, W)), rng.uniform(0.5, 5, (2, B, 1, H, W))
    hole = rng.random((B, H, W)) < 0.3
    labels[hole] = -1
    depth[1][hole[:, None]] = 0
    normals[1][np.repeat(hole[:, None], 3, axis=1)] = 0
    assert 0 < hole.sum() < hole.size
    return scores, labels, depth, normals


def tensors(*arrays):
    return [torch.tensor(array) for array in arrays]


def pixels():
    return [(b, y, x) for b in range(B) for y in range(H) for x in range(W)]


def test_segmentation_is_the_cross_entropy_of_labelled_pixels(drawn):
    scores, labels, _, _ = drawn
    values = []
    for b, y, x in pixels():
        if labels[b, y, x] >= 0:
            shares = [math.exp(scores[b, c, y, x]) for c in range(C)]
            values.append(-math.log(shares[labels[b, y, x]] / sum(shares)))
    loss = segmentation_loss(torch.tensor(scores).log_softmax(1), torch.tensor(labels))
    assert loss.item() == pytest.approx(sum(values) / len(values))


def test_depth_is_the_absolute_error_of_measured_pixels(drawn):
    answer, target = drawn[2]
    values = [abs(answer[b, 0, y, x] - target[b, 0, y, x]) for b, y, x in pixels() if target[b, 0, y, x] != 0]
    assert depth_loss(*tensors(answer, target)).item() == pytest.approx(sum(values) / len(values))


def test_normals_is_one_minus_the_cosine_of_pixels_with_a_normal(drawn):
    answer, target = drawn[3]
    values = []
    for b, y, x in pixels():
        if any(target[b, k, y, x] != 0 for k in range(3)):
            values.append(1 - sum(answer[b, k, y, x] * target[b, k, y, x] for k in range(3)))
    for protocol in ("sound", "paper"):
        assert normal_loss(*tensors(answer, target), protocol).item() == pytest.approx(sum(values) / len(values))


def test_the_papers_drop_a_normal_whose_components_sum_to_zero():
    answer = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).T.reshape(1, 3, 1, 2)
    target = torch.tensor([[0.5, -0.5, 0.0], [0.0, 1.0, 0.0]]).T.reshape(1, 3, 1, 2)
    assert valid_normals(target).tolist() == [[[True, True]]]
    assert valid_normals(target, "paper").tolist() == [[[False, True]]]
    assert normal_loss(answer, target).item() == pytest.approx(0.25)
    assert normal_loss(answer, target, "paper").item() == 0


def test_the_mean_is_over_the_pixels_of_the_whole_batch_not_over_images():
    target = torch.zeros(2, 1, 1, 4)
    target[0, 0, 0, 0] = 1.0
    target[1] = 1.0
    answer = torch.full_like(target, 1.0)
    answer[0, 0, 0, 0] = 6.0
    assert depth_loss(answer, target).item() == pytest.approx(1.0)  # 5 / 5 pixels, not (5 + 0) / 2 images


def test_pixels_that_do_not_count_have_no_gradient(drawn):
    scores, labels, depth, normals = (torch.tensor(array) for array in drawn)
    scores.requires_grad_()
    answers = [scores, depth[0].requires_grad_(), normals[0].requires_grad_()]
    loss = (
        segmentation_loss(scores.log_softmax(1), labels)
        + depth_loss(answers[1], depth[1])
        + normal_loss(answers[2], normals[1])
    )
    for gradient in torch.autograd.grad(loss, answers):
        hole = (labels == -1)[:, None].expand_as(gradient)
        assert not gradient[hole].any()
        assert gradient[~hole].any()


def test_without_a_pixel_that_counts_there_is_no_loss():
    nothing = torch.zeros(B, 3, H, W)
    assert segmentation_loss(torch.rand(B, C, H, W).log_softmax(1), torch.full((B, H, W), -1)) is None
    assert depth_loss(nothing[:, :1] + 1, nothing[:, :1]) is None
    assert normal_loss(nothing + 1, nothing) is None
    assert present({"depth": None, "normals": torch.tensor(2.0)}) == {"normals": torch.tensor(2.0)}


@pytest.mark.parametrize("method", ["ls", "scaleinvls", "famo"])
def test_a_batch_without_depth_is_a_step_without_that_task(method):
    torch.manual_seed(0)
    network = nyuv2.build_model(nyuv2.ModelConfig())
    balancer = balance.Balancer(tasks=nyuv2.TASKS, loss=method, gradient="pcgrad")
    normals = torch.nn.functional.normalize(torch.rand(2, 3, 16, 16), dim=1)
    batch = (torch.rand(2, 3, 16, 16), torch.randint(13, (2, 16, 16)), torch.zeros(2, 1, 16, 16), normals)
    losses = nyuv2.losses(network(batch[0]), batch)
    assert list(losses) == ["segmentation", "normals"]
    report = balancer.backward(losses, shared=network.trunk.parameters())
    assert tuple(report.tasks) == ("segmentation", "normals")
    assert all(parameter.grad is None for parameter in network.heads["depth"].parameters())
    assert all(parameter.grad.isfinite().all() for parameter in network.trunk.parameters())


def test_losses_of_the_experiments_are_these(drawn):
    scores, labels, depth, normals = (torch.tensor(array) for array in drawn)
    outputs = {"segmentation": scores.log_softmax(1), "depth": depth[0], "normals": normals[0]}
    of_rooms = nyuv2.losses(outputs, (torch.empty(0), labels, depth[1], normals[1]))
    of_streets = cityscapes.losses(outputs, (torch.empty(0), labels, depth[1]))
    assert tuple(of_rooms) == nyuv2.TASKS
    assert tuple(of_streets) == cityscapes.TASKS
    assert of_rooms["normals"] == normal_loss(normals[0], normals[1])
    for losses in (of_rooms, of_streets):
        assert losses["segmentation"] == segmentation_loss(outputs["segmentation"], labels)
        assert losses["depth"] == depth_loss(depth[0], depth[1])
