import math
from itertools import chain

import numpy as np
import pytest
import torch
from torchmetrics import MeanMetric

from experiments.problems import cityscapes, nyuv2
from experiments.problems.dense.metrics import (
    BINS,
    BatchMean,
    PixelMean,
    PixelMedian,
    absolute_errors,
    angles,
    below,
    depth_metrics,
    normal_metrics,
    segmentation_metrics,
)

HALF_A_BIN = 180 / BINS / 2


def unit_vectors(angle):
    """Vectors at these angles in degrees from (0, 0, 1). Shape (B, H, W) -> (B, 3, H, W)."""
    angle = torch.deg2rad(torch.as_tensor(angle, dtype=torch.float32))
    return torch.stack([angle.sin(), torch.zeros_like(angle), angle.cos()], dim=1)


def up(like):
    return torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(len(like), 3, *like.shape[1:]).clone()


@pytest.fixture
def batches():
    """Two batches, of two images and of one, with different errors and pixels that do not count."""
    rng = np.random.default_rng(0)
    made = []
    for count, worst in ((2, 60.0), (1, 10.0)):
        angle = rng.uniform(0, worst, (count, 6, 7))
        normal = up(torch.tensor(angle))
        depth = torch.tensor(rng.uniform(0.5, worst / 5, (count, 1, 6, 7)), dtype=torch.float32)
        label = torch.tensor(rng.integers(-1, 13, (count, 6, 7)))
        hole = torch.tensor(rng.random((count, 6, 7)) < 0.3 / count)
        normal[hole[:, None].expand_as(normal)] = 0
        depth[hole[:, None]] = 0
        scores = torch.tensor(rng.normal(size=(count, 13, 6, 7)), dtype=torch.float32)
        error = torch.tensor(rng.uniform(-0.4, 0.4, depth.shape), dtype=torch.float32)
        outputs = {"segmentation": scores.log_softmax(1), "depth": depth + error, "normals": unit_vectors(angle)}
        made.append((outputs, (torch.empty(count, 3, 6, 7), label, depth, normal)))
    return made


def results(metrics, batches):
    for outputs, batch in batches:
        for name, metric in metrics.items():
            task = name.partition("/")[0]
            metric.update(outputs[task], nyuv2.targets(batch)[task])
    return {name: metric.compute().item() for name, metric in metrics.items()}


def by_hand(outputs, batch):
    """Errors, ratios and angles of the pixels that count, one by one."""
    _, _, depth, normal = (tensor.double().numpy() for tensor in batch)
    answer, direction = outputs["depth"].double().numpy(), outputs["normals"].double().numpy()
    errors, ratios, degrees = [], [], []
    for b, y, x in np.ndindex(len(depth), *depth.shape[2:]):
        if depth[b, 0, y, x] != 0:
            errors.append(abs(answer[b, 0, y, x] - depth[b, 0, y, x]))
            ratios.append(errors[-1] / depth[b, 0, y, x])
        if normal[b, :, y, x].any():
            cosine = sum(direction[b, k, y, x] * normal[b, k, y, x] for k in range(3))
            degrees.append(math.degrees(math.acos(min(1.0, max(-1.0, cosine)))))
    return errors, ratios, degrees


def summary(errors, ratios, degrees):
    shares = {f"normals/within_{limit:g}": np.mean([d < limit for d in degrees]) for limit in (11.25, 22.5, 30)}
    return {
        "depth/abs_error": np.mean(errors),
        "depth/rel_error": np.mean(ratios),
        "normals/mean_angle": np.mean(degrees),
        "normals/median_angle": np.median(degrees),
        **shares,
    }


def segmentation_by_hand(batches):
    matrix = np.zeros((13, 13))
    for outputs, batch in batches:
        for b, y, x in np.ndindex(*batch[1].shape):
            if batch[1][b, y, x] >= 0:
                matrix[batch[1][b, y, x], outputs["segmentation"][b, :, y, x].argmax()] += 1
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return {
        "segmentation/miou": np.mean(matrix.diagonal() / union),
        "segmentation/pixel_accuracy": matrix.trace() / matrix.sum(),
    }


def test_names_order_and_direction_are_those_of_the_published_tables():
    names = [
        "segmentation/miou",
        "segmentation/pixel_accuracy",
        "depth/abs_error",
        "depth/rel_error",
        "normals/mean_angle",
        "normals/median_angle",
        "normals/within_11.25",
        "normals/within_22.5",
        "normals/within_30",
    ]
    for protocol in ("sound", "paper"):
        assert list(nyuv2.metrics(protocol)) == names
        assert list(cityscapes.metrics(protocol)) == names[:4]
    assert [name in nyuv2.HIGHER_IS_BETTER for name in names] == [True, True, False, False, False, False, True, True, True]
    assert set(names[:2]) == cityscapes.HIGHER_IS_BETTER


def test_sound_metrics_are_over_the_pixels_of_the_whole_data_set(batches):
    pixels = [[*chain(*parts)] for parts in zip(*(by_hand(*batch) for batch in batches), strict=True)]
    expected = segmentation_by_hand(batches) | summary(*pixels)
    assert results(nyuv2.metrics(), batches) == pytest.approx(expected, rel=1e-5, abs=HALF_A_BIN)
    exact = {name: value for name, value in expected.items() if name != "normals/median_angle"}
    sound = results(nyuv2.metrics(), batches)
    assert {name: sound[name] for name in exact} == pytest.approx(exact, rel=1e-5)


def test_paper_metrics_average_over_batches(batches):
    per_batch = [summary(*by_hand(*batch)) for batch in batches]
    expected = segmentation_by_hand(batches) | {name: np.mean([part[name] for part in per_batch]) for name in per_batch[0]}
    assert results(nyuv2.metrics("paper"), batches) == pytest.approx(expected, rel=1e-5)


def test_the_two_protocols_differ_where_batches_do(batches):
    sound, paper = results(nyuv2.metrics("sound"), batches), results(nyuv2.metrics("paper"), batches)
    for name in sound:
        if name.startswith("segmentation"):
            assert sound[name] == paper[name]
        else:
            assert abs(sound[name] - paper[name]) > 0.01 * paper[name]


def test_sound_metrics_do_not_depend_on_the_batches_but_paper_metrics_do(batches):
    outputs, batch = batches[0]
    single = [({task: o[k : k + 1] for task, o in outputs.items()}, [part[k : k + 1] for part in batch]) for k in range(2)]
    assert results(nyuv2.metrics(), single) == pytest.approx(results(nyuv2.metrics(), [(outputs, batch)]), rel=1e-6)
    together, apart = (results(nyuv2.metrics("paper"), cut) for cut in ([(outputs, batch)], single))
    assert abs(together["normals/median_angle"] - apart["normals/median_angle"]) > 0.1
    assert together["segmentation/miou"] == apart["segmentation/miou"]


def test_what_torchmetrics_would_give_without_the_mask(batches):
    """Why depth errors are not its own MeanAbsoluteError: pixels without a depth would count."""
    outputs, batch = batches[0]
    everywhere = MeanMetric()
    everywhere.update((outputs["depth"] - batch[2]).abs())
    metric = depth_metrics()["depth/abs_error"]
    assert metric(outputs["depth"], batch[2]).item() != pytest.approx(everywhere.compute().item(), rel=1e-3)


def test_a_class_that_never_occurs_is_left_out_of_the_mean():
    miou = segmentation_metrics(5)["segmentation/miou"]
    labels = torch.tensor([[[0, 0, 1, -1]]])
    answers = torch.tensor([[[0, 1, 1, 4]]])  # class 4 only where nothing is labelled
    miou.update(torch.nn.functional.one_hot(answers, 5).permute(0, 3, 1, 2).float().log(), labels)
    assert miou.compute().item() == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert miou.remark() == "a mean over 2 of 5 classes; the others do not occur"
    miou.update(torch.nn.functional.one_hot(answers, 5).permute(0, 3, 1, 2).float().log(), torch.tensor([[[0, 0, 1, 3]]]))
    assert miou.compute().item() == pytest.approx((1 / 2 + 1 / 2 + 0 + 0) / 4)
    assert "4 of 5" in miou.remark()
    miou.update(torch.nn.functional.one_hot(answers, 5).permute(0, 3, 1, 2).float().log(), torch.tensor([[[2, 2, 2, 2]]]))
    assert miou.remark() == ""


def test_no_angle_is_nan_where_rounding_makes_a_cosine_larger_than_one():
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(1, 3, 50, 50), dim=1)
    assert (vectors.square().sum(1) > 1).any()
    assert angles(vectors, vectors).max() < 0.04
    assert angles(vectors, -vectors).min() > 179.96


def test_angles_of_known_vectors_and_thresholds_that_are_strict():
    given = torch.tensor([[[0.0, 11.0, 22.0, 29.0, 90.0, 180.0]]])
    metrics = normal_metrics()
    target = up(given[:, 0:1].reshape(1, 1, 6))
    for metric in metrics.values():
        metric.update(unit_vectors(given.reshape(1, 1, 6)), target)
    shares = [metrics[f"normals/within_{limit}"].compute().item() for limit in ("11.25", "22.5", "30")]
    assert shares == pytest.approx([2 / 6, 3 / 6, 4 / 6])
    assert metrics["normals/mean_angle"].compute().item() == pytest.approx(332 / 6, rel=1e-5)
    assert metrics["normals/median_angle"].compute().item() == pytest.approx(25.5, abs=HALF_A_BIN)
    assert below(lambda answers, _: answers, 11.25, torch.tensor([11.25, 11.2]), target).tolist() == [0, 1]


def test_paper_angles_skip_normals_whose_components_sum_to_zero():
    target = torch.tensor([[0.6, -0.6, 0.0], [0.0, 0.0, 1.0]]).T.reshape(1, 3, 1, 2)
    assert len(angles(target, target)) == 2
    assert len(angles(target, target, protocol="paper")) == 1


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 1001])
def test_median_from_the_histogram_is_that_of_numpy_within_half_a_bin(count):
    values = torch.tensor(np.random.default_rng(count).uniform(0, 180, count) ** 2 / 180, dtype=torch.float32)
    metric = PixelMedian(lambda answers, _: answers, 180.0)
    for part in values.split(100):
        metric.update(part, part)
    assert metric.compute().item() == pytest.approx(np.median(values.double().numpy()), abs=1.001 * HALF_A_BIN)
    assert metric.counts.sum() == count
    assert metric.counts.numel() == BINS + 1


def test_medians_at_the_ends_of_the_scale():
    for value in (0.0, 180.0):
        metric = PixelMedian(lambda answers, _: answers, 180.0)
        assert metric(torch.tensor([value]), torch.tensor([value])).item() == pytest.approx(value, abs=HALF_A_BIN)


def test_a_batch_without_a_pixel_that_counts_changes_nothing(batches):
    outputs, batch = batches[0]
    empty = outputs, (batch[0], torch.full_like(batch[1], -1), torch.zeros_like(batch[2]), torch.zeros_like(batch[3]))
    for protocol in ("sound", "paper"):
        assert results(nyuv2.metrics(protocol), [(outputs, batch), empty]) == results(
            nyuv2.metrics(protocol), [(outputs, batch)]
        )


@pytest.mark.parametrize("protocol", ["sound", "paper"])
def test_nothing_that_counts_and_answers_of_nan_are_both_nan(batches, protocol):
    outputs, batch = batches[0]
    nothing = normal_metrics(protocol)["normals/median_angle"]
    nothing.update(outputs["normals"], torch.zeros_like(batch[3]))
    assert math.isnan(nothing.compute())
    diverged = {task: torch.full_like(answers, math.nan) for task, answers in outputs.items()}
    values = results(depth_metrics(protocol) | normal_metrics(protocol), [(outputs, batch), (diverged, batch)])
    assert all(math.isnan(value) for name, value in values.items() if "within" not in name)
    assert values["normals/within_30"] == pytest.approx(results(normal_metrics(), [(outputs, batch)])["normals/within_30"] / 2)


def test_a_metric_begins_anew_after_reset(batches):
    for metric in (PixelMean(absolute_errors), BatchMean(absolute_errors)):
        outputs, batch = batches[0]
        metric.update(outputs["depth"] + 5, batch[2])
        metric.reset()
        metric.update(outputs["depth"], batch[2])
        assert metric.compute().item() == pytest.approx(np.mean(by_hand(outputs, batch)[0]), rel=1e-5)


def test_a_misspelt_protocol_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'paper'"):
        nyuv2.metrics("papers")
