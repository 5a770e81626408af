"""The metrics of dense prediction, over a whole data set or as the papers average them.

`sound` (the default): every pixel that counts has the same weight, over the whole data set, for all sizes of batches.

`paper`: as in the published codes. Errors and angles are averaged over the pixels of a batch, and then over batches, including
the smaller last batch. The median is a mean of the batches' medians. A normal whose components sum to zero does not count. The
numbers depend on the batch size of the evaluation, which is 2 for NYUv2 and 8 for CityScapes in the papers. Differs: a batch
without a pixel that counts is skipped, where the codes divide by zero.

In both protocols mean intersection over union and pixel accuracy come from the counts of the whole data set, as in the codes.
Differs: a class that is neither in the labels nor predicted is left out of the mean, where the codes get NaN. A run then prints
the number of such classes.

Angles are arc cosines of a dot product clamped to [-1, 1]. In float32 the product of two vectors of length one can exceed one,
and its arc cosine would be NaN. Near one a float32 has steps of 6e-8, so angles below 0.02 degrees are not resolved.

Without a single pixel that counts an error or angle is NaN; it is also NaN where an output of the network is NaN.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from experiments.problems.dense.masks import IGNORED, check_protocol, valid_depth, valid_normals

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from experiments.problems.base import ProtocolName

    Measure = Callable[[Tensor, Tensor], Tensor]  # outputs and targets to one value for each of the N pixels that count

THRESHOLDS = (11.25, 22.5, 30.0)  # degrees
STRAIGHT = 180.0
BINS = 2**16
HIGHER_IS_BETTER = frozenset(
    {"segmentation/miou", "segmentation/pixel_accuracy", *(f"normals/within_{limit:g}" for limit in THRESHOLDS)}
)


def segmentation_metrics(num_classes: int) -> dict[str, Metric]:
    """Return fresh metrics of (B, C, H, W) scores and (B, H, W) labels, in 0..1; both protocols use them."""
    return {
        "segmentation/miou": MeanIoU(num_classes, ignore_index=IGNORED),
        "segmentation/pixel_accuracy": MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED),
    }


class MeanIoU(MulticlassJaccardIndex):
    """Mean intersection over union of the classes that are in the labels or predicted."""

    def remark(self) -> str:
        """Return a note on the number of these classes; nothing if they are all."""
        counts = self.confmat.sum(0) + self.confmat.sum(1)
        occurring = int((counts > 0).sum())
        return "" if occurring == len(counts) else f"a mean over {occurring} of {len(counts)} classes; the others do not occur"


def depth_metrics(protocol: ProtocolName = "sound") -> dict[str, Metric]:
    """Return fresh metrics of two (B, 1, H, W): errors in the unit of the depth, and as a ratio to the depth."""
    mean = averaged(protocol)
    return {"depth/abs_error": mean(absolute_errors), "depth/rel_error": mean(relative_errors)}


def normal_metrics(protocol: ProtocolName = "sound") -> dict[str, Metric]:
    """Return fresh metrics of two (B, 3, H, W): angles in degrees, and shares of pixels below an angle, in 0..1."""
    mean = averaged(protocol)
    measure = partial(angles, protocol=protocol)
    median = BatchMean(measure, middle) if protocol == "paper" else PixelMedian(measure, STRAIGHT)
    within = {f"normals/within_{limit:g}": mean(partial(below, measure, limit)) for limit in THRESHOLDS}
    return {"normals/mean_angle": mean(measure), "normals/median_angle": median, **within}


def averaged(protocol: ProtocolName) -> Callable[[Measure], Metric]:
    """Return the mean over pixels that a protocol uses."""
    check_protocol(protocol)
    return PixelMean if protocol == "sound" else BatchMean


def absolute_errors(depth: Tensor, target: Tensor) -> Tensor:
    """Return errors of the pixels with a depth. Shapes (B, 1, H, W) to (N,)."""
    valid = valid_depth(target)
    return (depth[valid] - target[valid]).abs()


def relative_errors(depth: Tensor, target: Tensor) -> Tensor:
    """Return errors divided by the depth; large where an inverse depth is near zero. Shapes (B, 1, H, W) to (N,)."""
    return absolute_errors(depth, target) / target[valid_depth(target)]


def angles(normals: Tensor, target: Tensor, *, protocol: ProtocolName = "sound") -> Tensor:
    """Return angles in degrees, 0 to 180, of the pixels with a normal. Shapes (B, 3, H, W) to (N,)."""
    cosines = (normals * target).sum(dim=1)[valid_normals(target, protocol)]
    return cosines.clamp(-1, 1).acos().rad2deg()


def below(measure: Measure, limit: float, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return one where the measure is less than the limit, else zero. Shape (N,)."""
    return (measure(outputs, targets) < limit).float()


class PixelMean(MeanMetric):
    """Mean of a measure over all pixels that count."""

    def __init__(self, measure: Measure) -> None:
        super().__init__(nan_strategy="disable")
        self.measure = measure

    def update(self, outputs: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        """Add the pixels of a batch."""
        super().update(self.measure(outputs, targets))


class BatchMean(MeanMetric):
    """Mean over batches of a statistic of the pixels of each batch."""

    def __init__(self, measure: Measure, statistic: Callable[[Tensor], Tensor] = torch.mean) -> None:
        super().__init__(nan_strategy="disable")
        self.measure = measure
        self.statistic = statistic

    def update(self, outputs: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        """Add a batch; skip a batch without a pixel that counts."""
        values = self.measure(outputs, targets)
        if values.numel():
            super().update(self.statistic(values))


def middle(values: Tensor) -> Tensor:
    """Return the median as in NumPy: of an even number of values, the mean of the two in the middle. Shape (N,) -> ()."""
    ordered = values.sort().values  # NaN comes last
    median = (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
    return torch.where(ordered[-1].isnan(), torch.nan, median)


class PixelMedian(Metric):
    """Median of a measure over all pixels that count, from a histogram.

    The histogram takes 512 KiB for any number of pixels, and is summed over ranks. The values of the 654 test images of NYUv2,
    72 million pixels, would take 276 MiB and could only be gathered. The error is at most half the width of a bin, 0.0014
    degrees for angles, plus a rounding error of the bin's index. Tables show 0.01 degrees.

    Args:
        measure: Measure with values in 0..top.
        top: End of the last bin.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, measure: Measure, top: float) -> None:
        super().__init__()
        self.measure = measure
        self.width = top / BINS
        self.add_state("counts", torch.zeros(BINS + 1, dtype=torch.int64), dist_reduce_fx="sum")  # the last one for NaN

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add the pixels of a batch."""
        values = self.measure(outputs, targets)
        bins = (values.nan_to_num(0.0) / self.width).long().clamp_(max=BINS - 1)
        self.counts += torch.bincount(bins.masked_fill_(values.isnan(), BINS), minlength=BINS + 1)

    def compute(self) -> Tensor:
        """Return the mean of the centres of the bins of the two middle values, which coincide if their number is odd."""
        up_to = self.counts[:-1].cumsum(0)
        count = up_to[-1]
        middles = torch.stack([count - 1, count]).clamp_min(0) // 2
        median = (torch.searchsorted(up_to, middles, right=True) + 0.5).mean() * self.width
        return torch.where((count > 0) & (self.counts[-1] == 0), median, torch.nan)
