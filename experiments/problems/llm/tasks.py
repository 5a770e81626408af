"""The tasks of a language model: token losses, and metrics of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy, pad
from torchmetrics import MeanMetric

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor
    from torchmetrics import Metric

    from experiments.problems.base import Batch

TASKS = ("completion", "docstring", "code", "name")
HIGHER_IS_BETTER: frozenset[str] = frozenset()
NAMED = ("name",)  # tasks whose short answers are also compared exactly
NOTHING = -1  # token of padding, and label of tokens that the loss does not count


def micro_batches(batch: Batch) -> Iterator[Batch]:
    """Yield one batch for each task, without the samples of the other tasks."""
    tokens, *rest = batch
    for k in range(tokens.shape[1]):
        of_task = torch.full_like(tokens, NOTHING)
        of_task[:, k] = tokens[:, k]
        yield of_task, *rest


def targets(batch: Batch, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
    """Return by task the token that follows each token, `NOTHING` where the loss does not count it. Shape (B, T)."""
    tokens, answers, _ = batch
    following = torch.where(answers, tokens, NOTHING)[..., 1:]
    labels = pad(following, (0, 1), value=NOTHING)
    return dict(zip(tasks, labels.unbind(1), strict=True))


def counts(batch: Batch, tasks: tuple[str, ...] = TASKS) -> dict[str, int]:
    """Return by task a multiple of the number of tokens that its loss is divided by; the multiple is common to all."""
    return {task: round(len(tasks) * number) for task, number in zip(tasks, batch[2].tolist(), strict=True)}


def losses(outputs: dict[str, Tensor], batch: Batch, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
    """Return cross-entropies of the answers' tokens, summed over the batch and divided by the batch's numbers of tokens.

    Args:
        outputs: Logits by task, of all tasks or of some. Shape (B, T, V), where T may be shorter than in the batch.
        batch: Tokens, answers, and the numbers of tokens that divide the losses.
        tasks: Names of the tasks.

    Returns:
        Scalars by task, for the tasks that have outputs.
    """
    labels, divisors = targets(batch, tasks), dict(zip(tasks, batch[2], strict=True))
    return {task: _summed(logits, labels[task]) / divisors[task].to(logits.dtype) for task, logits in outputs.items()}


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of the counted tokens."""
    labels = labels[:, : logits.shape[1]]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NOTHING, reduction="sum")


class TokenLoss(MeanMetric):
    """Mean cross-entropy of the counted tokens over all samples, in nats per token."""

    def update(self, logits: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """Count a batch. Shapes (B, T, V) and (B, T)."""
        tokens = (labels != NOTHING).sum()
        super().update(_summed(logits.float(), labels) / tokens, tokens)


class Perplexity(TokenLoss):
    """The exponential of the mean cross-entropy."""

    def compute(self) -> Tensor:
        """Return the perplexity, at least 1."""
        mean: Tensor = super().compute()
        return mean.exp()


class Mismatch(MeanMetric):
    """Share of samples whose answers greedy decoding does not give exactly, ends included: one minus the exact match.

    Changes of a small exact match relative to a baseline, which may be zero, would say little. No decoding is needed. Greedy
    decoding gives an answer if and only if each of its tokens has the largest logit after the prompt and the tokens before it.
    In a conversation with several answers, each must be given after the true ones.
    """

    def update(self, logits: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """Count a batch. Shapes (B, T, V) and (B, T)."""
        labels = labels[:, : logits.shape[1]]
        super().update(((logits.argmax(-1) != labels) & (labels != NOTHING)).any(1).float())

    def remark(self) -> str:
        """Return the exact match in words."""
        samples = round(float(self.weight))
        right = samples - round(float(self.mean_value))
        return f"one minus the exact match, of {right} out of {samples} answers"


def metrics(tasks: tuple[str, ...] = TASKS) -> dict[str, Metric]:
    """Return fresh losses and perplexities of all tasks, and the mismatch of the task ``name``, if it exists."""
    made: dict[str, Metric] = {}
    for task in tasks:
        made |= {f"{task}/loss": TokenLoss(), f"{task}/perplexity": Perplexity()}
        made |= {f"{task}/mismatch": Mismatch()} if task in NAMED else {}
    return made


def score(metrics: Mapping[str, float]) -> float:
    """Return the mean of the tasks' losses, by which the epoch is chosen."""
    values = [value for name, value in metrics.items() if name.endswith("/loss")]
    return sum(values) / len(values)
