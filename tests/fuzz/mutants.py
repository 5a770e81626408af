"""Damages that a wrong stage could do, each of which the comparison must see."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from balance.stage.report import Report
    from tests.fuzz.networks import Built
    from tests.fuzz.oracle import Expected

    Mutant = Callable[[Built, Expected, Report], Report | None]

MUTANTS: dict[str, Mutant] = {}


def mutant(function: Mutant) -> Mutant:
    MUTANTS[function.__name__] = function
    return function


def _reached(net: Built, expected: Expected) -> Iterator[tuple[str, Tensor]]:
    for name, row in expected.gradients.items():
        leaf = net.leaves[name]
        if leaf.grad is not None and any(g is not None for g in row):
            yield name, leaf


@mutant
def one_parameter_off_by_one_percent(net: Built, expected: Expected, report: Report) -> Report | None:
    for _, leaf in _reached(net, expected):
        leaf.grad *= 1.01
        return report
    return None


@mutant
def drops_a_task(net: Built, expected: Expected, report: Report) -> Report | None:
    if report.gradient_weights is None:
        return None
    weight = float(report.gradient_weights[0] * report.loss_weights[0])
    for name, leaf in _reached(net, expected):
        if name in expected.trunk and expected.gradients[name][0] is not None:
            leaf.grad = leaf.grad - (weight * expected.gradients[name][0]).to(leaf.dtype)
            return report
    return None


@mutant
def reports_a_weight_off_by_one_percent(net: Built, expected: Expected, report: Report) -> Report | None:
    if report.gradient_weights is None:
        return None
    weights = report.gradient_weights.clone()
    weights[0] *= 1.01
    return replace(report, gradient_weights=weights)


@mutant
def gives_a_task_outside_the_rule_no_weight(net: Built, expected: Expected, report: Report) -> Report | None:
    outside = [k for k in range(len(report.tasks)) if k not in expected.rule_tasks]
    if report.gradient_weights is None or not outside or not expected.balanced:
        return None
    weights = report.gradient_weights.clone()
    weights[outside] = 0
    return replace(report, gradient_weights=weights)


@mutant
def reports_a_gramian_off_by_one_in_a_thousand(net: Built, expected: Expected, report: Report) -> Report | None:
    return None if report.gramian is None else replace(report, gramian=report.gramian * 1.001)


@mutant
def writes_zeros_where_no_task_reaches(net: Built, expected: Expected, report: Report) -> Report | None:
    for name, leaf in net.leaves.items():
        if leaf.grad is None and name in expected.gradients:
            leaf.grad = torch.zeros_like(leaf)
            return report
    return None


@mutant
def writes_to_a_frozen_parameter(net: Built, expected: Expected, report: Report) -> Report | None:
    for name, leaf in net.leaves.items():
        if name not in expected.plan.live:
            leaf.grad = torch.ones_like(leaf) if leaf.grad is None else leaf.grad + 1
            return report
    return None


@mutant
def writes_other_strides(net: Built, expected: Expected, report: Report) -> Report | None:
    for _, leaf in _reached(net, expected):
        if leaf.dim() == 2 and 1 not in leaf.shape and not leaf.grad.is_sparse and leaf.is_contiguous():
            leaf.grad = leaf.grad.t().contiguous().t()
            return report
    return None


@mutant
def makes_a_sparse_gradient_dense(net: Built, expected: Expected, report: Report) -> Report | None:
    for _, leaf in _reached(net, expected):
        if leaf.grad.is_sparse:
            leaf.grad = leaf.grad.to_dense()
            return report
    return None


@mutant
def adds_a_copy_instead_of_in_place(net: Built, expected: Expected, report: Report) -> Report | None:
    for _, leaf in _reached(net, expected):
        leaf.grad = leaf.grad.clone()
    return report
