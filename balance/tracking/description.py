"""Description of a run for later comparisons: its methods and settings, the directions of its metrics, and baselines."""

from __future__ import annotations

import json
import math
import re
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

from ..messages import suggestion
from ..stage.balancer import Balancer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..stage.methods import Methods

METRIC = re.compile(r"[\w. :-]+/[\w. :-]+")  # <task>/<metric>, in characters that MLflow accepts
LONGEST_TAG = 8000  # characters that MLflow stores
HIGHER_IS_BETTER, BASELINES, SINGLE_TASK = "higher_is_better", "baselines", "single_task"  # names of tags
PLAIN = "ls"  # loss balancer of a run for which only a gradient method is given


class Description(NamedTuple):
    """Tags and parameters of a run."""

    tags: dict[str, str]
    params: dict[str, Any]


def describe_run(balancer: object, loss_method: str | None, gradient_method: str | None, seed: int | None) -> Description:
    """Return the tags and parameters that `balance.compare` reads; none without a balancer, methods and seed.

    Args:
        balancer: A `Balancer`, or None.
        loss_method: Name of the loss method of a run without a balancer.
        gradient_method: Name of the gradient method of a run without a balancer.
        seed: Seed of the run.

    Raises:
        TypeError: If ``balancer`` is no `Balancer`, or ``seed`` no integer.
        ValueError: If methods are given twice, or without a seed.
    """
    is_named = loss_method is not None or gradient_method is not None
    if balancer is not None and not isinstance(balancer, Balancer):
        raise TypeError(f"balancer must be a Balancer, but got {balancer!r}. Give loss_method= and gradient_method= instead.")
    if balancer is not None and is_named:
        raise ValueError("loss_method and gradient_method are read from the balancer. Give either them or balancer=.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an integer, but got {seed!r}.")
    if balancer is None and not is_named:
        return Description({}, {}) if seed is None else Description({"seed": str(seed)}, {"seed": seed})
    if seed is None:
        raise ValueError("A run with methods must have a seed, which distinguishes its repetitions. Give seed=0, 1, ...")
    loss, gradient, settings = _methods(balancer) if balancer is not None else (loss_method or PLAIN, gradient_method, {})
    tags = {"loss_method": loss, "gradient_method": gradient or "none", "seed": str(seed)}
    tags |= {"kind": "baseline" if loss == "stl" else "run"}
    if balancer is not None and balancer.tasks and loss == "stl":
        tags[SINGLE_TASK] = balancer.tasks[settings["loss.main_task"]]
    return Description(tags, {"loss_method": loss, "gradient_method": gradient, "seed": seed} | settings)


def _methods(balancer: Balancer) -> Methods:
    """Return the methods of a balancer, with the choices of the stage among the options."""
    stage = {
        "balancer.source": balancer.source,
        "balancer.heads": balancer.heads,
        "balancer.scale": balancer.scale,
        "balancer.metric": "gradients" if balancer.metric is None else "optimizer",
        "balancer.weights": None if balancer.priorities is None else balancer.priorities.tolist(),
    }
    return balancer.methods._replace(options=balancer.methods.options | stage)


def declared_tags(higher_is_better: Iterable[str] | None, baselines: Mapping[str, float] | None) -> dict[str, str]:
    """Return the tags that declare the directions of metrics and their single-task values.

    Args:
        higher_is_better: Names of the metrics that should be large; None if it is not declared.
        baselines: Single-task value of each metric; None if they are not declared.

    Raises:
        TypeError: If ``higher_is_better`` is a single name, or a baseline is no number.
        ValueError: If a name is not of the form ``<task>/<metric>``, a baseline is zero or not finite, or a tag is too long.
    """
    tags: dict[str, str] = {}
    if isinstance(higher_is_better, str):
        raise TypeError(f"{HIGHER_IS_BETTER} must be a sequence of names, but got {higher_is_better!r}. Use a tuple.")
    if higher_is_better is not None:
        names = sorted(higher_is_better)
        check_names(names, HIGHER_IS_BETTER)
        tags[HIGHER_IS_BETTER] = json.dumps(names)
    if baselines is not None:
        check_names(baselines, BASELINES)
        tags[BASELINES] = json.dumps({name: baseline(name, value) for name, value in baselines.items()})
    for name, value in tags.items():
        if len(value) > LONGEST_TAG:
            raise ValueError(
                f"{name} must have at most {LONGEST_TAG} characters as a tag of MLflow, but has {len(value)}. Give it to "
                "balance.compare instead."
            )
    return tags


def baseline(name: str, value: object) -> float:
    """Return the single-task value of a metric as a float.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is zero or not finite, since delta_m divides by it.
    """
    number = as_number(name, value)
    if number == 0 or not math.isfinite(number):
        raise ValueError(f"The baseline of '{name}' must be a finite number other than zero, but got {number}.")
    return number


def as_number(name: str, value: object) -> float:
    """Return a metric as a float, also if it is a tensor with one entry.

    Raises:
        TypeError: If it is no number.
    """
    item = getattr(value, "item", None)
    number = item() if callable(item) else value
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"The value of '{name}' must be a number, but got {value!r}.")
    return float(number)


def check_names(names: Iterable[str], owner: str) -> None:
    """Check names of metrics.

    Args:
        names: The names.
        owner: Argument in which they are, for the message.

    Raises:
        ValueError: If a name is not of the form ``<task>/<metric>``.
    """
    for name in names:
        if not (isinstance(name, str) and METRIC.fullmatch(name)):
            raise ValueError(
                f"Names in {owner} must be <task>/<metric>, of letters, digits, blanks and . _ - : only, but got {name!r}. Use "
                "for example 'digit/accuracy'."
            )


def check_final(metrics: Iterable[str], tags: Mapping[str, str], params: Mapping[str, Any]) -> None:
    """Check that the final metrics of a run can be compared with the metrics of other runs.

    Args:
        metrics: Names of the final metrics.
        tags: Tags of the run.
        params: Parameters of the run.

    Raises:
        ValueError: If there are none, the run has no methods, seed or directions, or these name other metrics.
    """
    names = sorted(metrics)
    if not names:
        raise ValueError("The final metrics must be at least one, but got none.")
    check_names(names, "the final metrics")
    if "loss_method" not in params or "seed" not in params:
        raise ValueError("A run with final metrics must have methods and a seed. Use Tracker(..., balancer=balancer, seed=0).")
    if HIGHER_IS_BETTER not in tags:
        raise ValueError(
            f"A run with final metrics must declare {HIGHER_IS_BETTER}, the names of the metrics that should be large. Use "
            f"Tracker(..., {HIGHER_IS_BETTER}=()) if all should be small."
        )
    is_single_task = params["loss_method"] == "stl"  # its final metrics can be of one task only
    for name in () if is_single_task else json.loads(tags[HIGHER_IS_BETTER]):
        if name not in names:
            raise ValueError(f"{HIGHER_IS_BETTER} names '{name}', which is no final metric.{suggestion(name, names)}")
    declared = None if is_single_task or BASELINES not in tags else set(json.loads(tags[BASELINES]))
    if declared is not None and declared != set(names):
        different = ", ".join(sorted(declared ^ set(names)))
        raise ValueError(f"{BASELINES} must name exactly the final metrics, but differ in {different}.")


def task_of(metrics: Iterable[str]) -> str:
    """Return the task of a single-task run, from the names of its final metrics.

    Raises:
        ValueError: If they are metrics of several tasks.
    """
    tasks = sorted({name.partition("/")[0] for name in metrics})
    if len(tasks) > 1:
        raise ValueError(
            f"The final metrics of a single-task run must be of one task, but got {', '.join(tasks)}. Record the metrics of "
            'the task that was trained, or use Balancer(..., loss="stl", loss_options={"main_task": k}).'
        )
    return tasks[0]
