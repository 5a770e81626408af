"""Numbers of a diagnosis -> what to compare, in plain words, with the reasons."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from balance.diagnosis.statistics import NEGLIGIBLE, Look, Price, median, ratio

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

IMBALANCE = 10.0  # ratio of gradient lengths: the longest has 100 times the squared length of the shortest, and drowns it
UNLEVEL = 3.0  # the same where each gradient is divided by its loss: about 10 times, which a loss balancer leaves behind
DOMINANT = 0.9  # share of one task in the squared length of the summed gradient, from which on the sum is that task
EXPENSIVE = 2.0  # times a plain step: from here on it is worth while to balance rarely, or by features
RARELY = 10  # steps for which weights are kept, in that advice: nine of ten then cost a plain step

BY_SIZE = ("scaleinvls", "famo", "uw")  # loss balancers that divide each loss by its size, in one way or another
BY_LENGTH = ("mgda", "imtl")  # gradient balancers that give larger weights to shorter gradients
BY_CONFLICT = ("pcgrad", "cagrad")  # gradient balancers that repair or bound conflict


class Advice(NamedTuple):
    """Sentences, and the names that they suggest."""

    recommendation: tuple[str, ...]
    loss_methods: tuple[str, ...] = ()
    gradient_methods: tuple[str, ...] = ()


def advise(start: Look, end: Look, of_losses: Mapping[str, Price], of_gradients: Mapping[str, Price]) -> Advice:
    """What to compare, and why.

    Args:
        start: Before some training.
        end: After it, on which most of the advice rests.
        of_losses: Prices by loss balancer.
        of_gradients: Prices by gradient balancer.
    """
    parts = [_on_scale(start, end, of_losses), _on_length(end, of_gradients), _on_conflict(start, end, of_gradients)]
    methods = tuple(name for part in parts for name in part.gradient_methods)
    sentences = [sentence for part in parts for sentence in part.recommendation]
    if idle := [task for task, norm in zip(end.tasks, median(end.norms).tolist(), strict=True) if norm == 0]:
        sentences.append(f"The gradient of {quoted(idle)} is zero on the shared parameters: no rule can balance that.")
    if methods:
        sentences += _on_price(methods[0], of_gradients[methods[0]], len(end.tasks))
    sentences.append(
        "This is a guess from the start of training. Only a comparison of finished runs over several seeds, equal weights "
        "among them, can confirm it."
    )
    return Advice(tuple(sentences), parts[0].loss_methods, methods)


def _on_scale(start: Look, end: Look, prices: Mapping[str, Price]) -> Advice:
    """Whether the tasks need other weights than equal ones."""
    long, short = _extremes(end.norms, end.tasks)
    factor, left = ratio(end.norms), ratio(end.relative_norms)
    if factor < IMBALANCE:
        text = f"Task gradients are of similar length: the longest, of '{long}', is {number(factor)} times the shortest."
        if ratio(end.losses) >= IMBALANCE:
            text += " The losses differ more, but it is their gradients that count."
        return Advice((f"{text} Scale is no reason for a loss balancer.",))
    text = f"The gradient of '{long}' is {number(factor)} times as long as that of '{short}'."
    share, leader = end.shares.max(dim=0)
    if share >= DOMINANT:
        text += f" With equal weights the shared parameters follow '{end.tasks[int(leader)]}' alone."
    if left >= factor:
        return Advice((f"{text} Dividing by the losses does not help, so loss balancers that do so are no remedy.",))
    offer, methods = _offer("loss", BY_SIZE, prices)
    text += f" Divided by their losses, the gradients differ by a factor of {number(left)}: {offer}."
    lowest = torch.cat([start.losses, end.losses]).amin(dim=0).tolist()
    if negative := [task for task, low in zip(end.tasks, lowest, strict=True) if low <= 0]:
        text += f" The loss of {quoted(negative)} is not always positive, as rules with a logarithm need: give lower bounds."
    return Advice((text,), methods)


def _on_length(end: Look, prices: Mapping[str, Price]) -> Advice:
    """Whether gradients stay unequal where a loss balancer has done what it can."""
    left = ratio(end.relative_norms)
    if ratio(end.norms) < IMBALANCE or left < UNLEVEL:
        return Advice(())
    long, short = _extremes(end.relative_norms, end.tasks)
    offer, methods = _offer("gradient", BY_LENGTH, prices)
    text = (
        f"Even divided by its loss, the gradient of '{long}' is {number(left)} times that of '{short}'. Gradient balancers "
        f"that favour short gradients level that: {offer}, with a loss balancer and without."
    )
    return Advice((text,), (), methods)


def _on_conflict(start: Look, end: Look, prices: Mapping[str, Price]) -> Advice:
    """Whether gradients work against each other, by more than chance."""
    lasting = sorted((pair for pair in end.pairs if pair.reading == "conflict"), key=lambda pair: pair.mean)
    if lasting:
        worst = lasting[0]
        offer, methods = _offer("gradient", BY_CONFLICT, prices)
        others = {1: "", 2: ", as does one more pair"}.get(len(lasting), f", as do {len(lasting) - 1} more pairs")
        text = f"{quoted(worst.tasks)} conflict at nearly every batch (cosine {worst.mean:.2f} ± {worst.spread:.2f}){others}"
        return Advice((f"{text}: {offer}.",), (), methods)
    if any(pair.reading == "noise" for pair in end.pairs):
        share = f"{100 * end.conflict_share:.0f} % of all cosines are negative"
        text = f"Conflict is noise: {share}, but no pair of tasks conflicts at nearly every batch."
    else:
        text = f"There is no conflict: no mean cosine is below -{NEGLIGIBLE}."
    if passing := [pair.tasks for pair in start.pairs if pair.reading == "conflict"]:
        text += f" {quoted(passing[0])} conflict at the start only."
    return Advice((f"{text} Do not pay for a rule that repairs it ({', '.join(BY_CONFLICT)}).",))


def _on_price(name: str, price: Price, num_tasks: int) -> list[str]:
    """How to pay less for a gradient balancer that is dear."""
    if max(price.time, price.memory) < EXPENSIVE:
        return []
    return [
        f"If {price.time:.1f} times the time and {price.memory:.1f} times the memory of a plain step are too much, keep the "
        f'weights of {name} for {RARELY} steps, gradient=compose.every({RARELY}, "{name}", num_tasks={num_tasks}), or measure '
        'at the features in place of the parameters, source="features".'
    ]


def _offer(kind: str, candidates: Sequence[str], prices: Mapping[str, Price]) -> tuple[str, tuple[str, ...]]:
    """Those of the candidates that run, in words and as names."""
    names = tuple(name for name in candidates if name in prices and prices[name].cost is not None)
    if not names:
        return f"a {kind} balancer such as {', '.join(candidates)} could help, but none of them was priced or runs here", ()
    times = ", ".join(f"{prices[name].time:.1f}" for name in names)
    return f"compare {', '.join(names)} ({times} times the time of a plain step)", names


def _extremes(values: Tensor, tasks: Sequence[str]) -> tuple[str, str]:
    """Names of the tasks with the largest and the smallest median, of those that `ratio` looks at. Shape (B, K)."""
    medians = median(values)
    counted = (medians > 0) & medians.isfinite()
    return tasks[int(medians.where(counted, -math.inf).argmax())], tasks[int(medians.where(counted, math.inf).argmin())]


def number(value: float) -> str:
    """Three digits, without an exponent up to a million."""
    return f"{float(f'{value:.3g}'):g}" if math.isfinite(value) else "-"


def quoted(tasks: Iterable[str]) -> str:
    """Names in a sentence."""
    return " and ".join(f"'{task}'" for task in tasks)
