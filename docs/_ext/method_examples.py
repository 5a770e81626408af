"""Examples of a method: a program that trains a few steps with it, and a command of the trainer."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING

from method_facts import REGISTRIES, options, takes

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDTH = 80  # of a line
SHOWN = 3  # options in a command
DEFAULT_OPTIMIZER = "Adam"

BEGIN = """import torch
from torch import nn

import balance

tasks = ("depth", "normals", "edges")
trunk = nn.Linear(8, 16)
heads = nn.ModuleDict({task: nn.Linear(16, 1) for task in tasks})
"""
LOSSES = """parameters = [*trunk.parameters(), *heads.parameters(), *balancer.parameters()]
optimizer = torch.optim.{optimizer}(parameters, lr=1e-3)


def losses(batch):
    features = trunk(batch).relu()
    return {task: heads[task](features).square().mean() for task in tasks}


"""


def snippet(kind: str, name: str) -> str:
    """Return a program that trains some steps with a method, and makes the calls that the method needs.

    Args:
        kind: ``loss`` or ``gradient``.
        name: A registered name.
    """
    losses = LOSSES.replace("{optimizer}", optimizer(kind, name))
    return f"{BEGIN}{balancer(kind, name)}\n{losses}" + "".join(f"{line}\n" for line in loop(kind, name))


def optimizer(kind: str, name: str) -> str:
    """Return the optimizer that the docstring of a method recommends, in a sentence that begins with Use; else Adam."""
    recommended = re.search(r"\bUse (SGD|Adam|AdamW)\b", inspect.getdoc(REGISTRIES[kind].method(name).rule) or "")
    return recommended[1] if recommended else DEFAULT_OPTIMIZER


def balancer(kind: str, name: str) -> str:
    """Return the statement that builds the balancer, with the default options of the method."""
    given = [f'"{option.name}": {option.default!r}' for option in options(kind, name) if option.default is not None]
    given = [text.replace("'", '"') for text in given]
    dictionary = f"{kind}_options={{{', '.join(given)}}}" if given else ""
    short = f'balancer = balance.Balancer(tasks, {kind}="{name}"{f", {dictionary}" if given else ""})'
    if len(short) <= WIDTH:
        return short
    body = (
        [f"{kind}_options={{", *(f"    {text}," for text in given), "},"] if len(dictionary) > WIDTH - 5 else [f"{dictionary},"]
    )
    lines = ["tasks,", f'{kind}="{name}",', *body]
    return "\n".join(["balancer = balance.Balancer(", *(f"    {line}" for line in lines), ")"])


def loop(kind: str, name: str) -> Iterator[str]:
    """Yield the lines of the training loop."""
    needs = REGISTRIES[kind].traits(name).needs
    several = kind == "gradient" and takes(REGISTRIES[kind].build(name, num_tasks=2), "cross")
    yield "for epoch in range(2):"
    if several:
        yield "    for batch, second, third in torch.randn(3, 3, 32, 8):  # three independent batches"
    else:
        yield "    for batch in torch.randn(3, 32, 8):"
    yield "        optimizer.zero_grad()"
    if several:
        yield "        further = losses(second), losses(third)"
        yield "        shared = trunk.parameters()"
        yield "        report = balancer.backward(losses(batch), shared=shared, further=further)"
    else:
        yield "        report = balancer.backward(losses(batch), shared=trunk.parameters())"
    yield "        optimizer.step()"
    if "observe" in needs:
        yield "        with balance.extra_forward(trunk), torch.no_grad():"
        yield "            balancer.observe(losses(batch))  # the same batch, after the step"
    if "validation" in needs:
        yield "        with torch.no_grad():"
        yield "            balancer.observe_validation(losses(torch.randn(32, 8)))  # validation data"
    if "end_epoch" in needs:
        yield "    balancer.end_epoch()"
    yield "print(report.losses)"
    if kind == "loss":
        yield "print(report.loss_weights)"
    elif REGISTRIES[kind].sees(name) == "gramian":
        yield "print(report.gradient_weights, report.conflicts)"


def command(kind: str, name: str) -> str:
    """Return a command that trains the network of the default experiment with a method and some of its options."""
    given = [option for option in options(kind, name) if option.default is not None][:SHOWN]
    words = [f"{kind}.{option.name}={as_word(option.default)}" for option in given]
    start = f"python experiments/trainer.py --{kind}_method={name}"
    line = " ".join([start, *words])
    return line if len(line) <= WIDTH else f"{start} \\\n    {' '.join(words)}"


def as_word(value: object) -> str:
    """Return a value as it is written on a command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)
