"""Micro-batches that make one step together, exactly as all their samples in one batch would."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

from ..engine.accumulate import leaf_gradients, merged_pairs
from ..engine.collected import CollectedRows, collected_partition
from ..engine.graph import leaves
from ..engine.over_ranks import sum_gradients
from ..engine.passes import LossOutputs, sequential_passes
from .arguments import StepArguments, StepLosses, read_losses, require_present
from .execution import execute, read_partition
from .over_ranks import agree
from .owner import Owner, Prepared
from .plain_step import Outcome, Seed, extra_gradients, seed_of, unknown_report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from torch.amp.grad_scaler import GradScaler

    from ..engine.accumulate import LeafGradient
    from ..engine.partition import Partition
    from .report import Report


class Collector(Owner, Protocol):
    """A balancer that can collect; see `Owner`.

    Attributes:
        collection: The open collection; None if there is none.
    """

    collection: Collection | None


@contextmanager
def collecting(owner: Collector, factor: float, finish: Callable[[Outcome], object]) -> Iterator[Collection]:
    """Open a collection, and make its step on exit, unless the body raises.

    Args:
        owner: The balancer.
        factor: Factor on all gradients that are added to ``.grad``.
        finish: Records the step.

    Yields:
        The collection.

    Raises:
        RuntimeError: If a collection is open.
    """
    if owner.collection is not None:
        raise RuntimeError("A collection is open already. Leave its context before you open another one.")
    collection = Collection(owner, factor)
    owner.collection = collection
    try:
        yield collection
    finally:
        owner.collection = None
    finish(collection.take_step())


class Collection:
    """Losses and gradients of the micro-batches of one step.

    Args:
        owner: The balancer.
        factor: Factor on all gradients that are added to ``.grad``.
    """

    def __init__(self, owner: Owner, factor: float) -> None:
        StepArguments({}, factor=factor).check()
        self._owner, self._factor = owner, factor
        K = len(owner.tasks)
        self._rows = CollectedRows(K)
        self._sums = torch.zeros(2, K, dtype=torch.float64, device="cpu")  # of losses over samples, and of samples
        self._trunk: list[Tensor] = []
        self._seed: Seed | None = None
        self._scaler: GradScaler | None = None
        self._extras: list[LeafGradient] = []
        self._num_extras = 0
        self._is_whole = True  # False once a call has added only some of its gradients

    @torch.enable_grad()
    def add(self, given: StepArguments) -> Report:
        """Add the losses and gradients of a micro-batch; its graph is freed.

        Args:
            given: Arguments of `Balancer.backward`.

        Returns:
            A record without weights.

        Raises:
            ValueError: If an argument is wrong, or does not fit the calls before.
        """
        owner = self._owner
        self._refuse(given)
        step = read_losses(given.losses, owner.tasks, owner.nan, owner.zero, given.counts)
        require_present(step, given.losses, owner.tasks)
        parts = read_partition(owner, step, given, list(owner.parameters()))
        if parts is None:
            reached = [leaf for leaf in leaves(step.roots) if leaf.requires_grad]
            parts = collected_partition([], reached)
        seed = self._agreed_seed(step, given)
        self._add_trunk(parts)
        if given.extra is not None:
            self._extras = merged_pairs(self._extras, extra_gradients(given.extra, 1.0, seed))
            self._num_extras += 1
        self._is_whole = False
        with torch.autocast(step.losses.device.type, enabled=False):
            self._add_gradients(step, parts, seed)
        self._is_whole = True
        counts = torch.tensor(step.counts, dtype=torch.float64, device="cpu")
        self._sums[0, step.indices] += counts * step.host
        self._sums[1, step.indices] += counts
        return unknown_report(step)

    def take_step(self) -> Outcome:
        """Take the step of all micro-batches.

        Returns:
            The record of the step, and whether the scaler will skip it.

        Raises:
            ValueError: If there is no micro-batch, or a loss or gradient is not finite.
            RuntimeError: If a call has failed after it had added some of its gradients.
        """
        if not self._is_whole:
            raise RuntimeError(
                "A call inside of collect() failed during its backward passes, so that the step would lack some of its "
                "gradients. Let its error leave the context, and collect again."
            )
        owner, ranks, parameters = self._owner, self._owner.ranks, list(self._owner.parameters())
        step = self._mean_losses()
        agreed = None
        heads = self._heads()
        if ranks.size > 1:
            everything = [*self._trunk, *heads]
            has_extra = bool(self._num_extras)
            agreed = agree(step, owner.tasks, everything, parameters, ranks, extra=has_extra, is_collected=True)
            step, heads = agreed.step, agreed.model.heads([*self._trunk, *parameters])
        require_present(step, {}, owner.tasks)
        extras = self._mean_extras([*self._trunk, *heads], has_extra=agreed is None or agreed.has_extra)
        tasks = step.indices.tolist()
        self._rows.divide(tasks, step.counts)
        parts = collected_partition(self._trunk, heads)
        as_matrix = owner.gradient_balancer is not None and owner.gradient_balancer.sees == "jacobian"
        roots = None if owner.metric is None else owner.metric.roots(parts.trunk)
        gradients = self._rows.gradients(parts, tasks, step.one, ranks, as_matrix=as_matrix, roots=roots)
        given = StepArguments({}, scaler=self._scaler, factor=self._factor)
        return execute(owner, given, Prepared(parameters, step, parts, agreed, gradients, extras))

    def _refuse(self, given: StepArguments) -> None:
        """Refuse arguments that a collection has no use for."""
        rule = self._owner.gradient_balancer
        if given.factor != 1.0:
            raise ValueError(
                f"Inside of collect() the step is the mean over all calls, without a factor, but got factor={given.factor}. "
                "Use collect(factor=...), which is applied once."
            )
        if given.measure is not None:
            raise ValueError("measure is for single steps: collect() keeps the gradients of all shared parameters anyway.")
        if rule is not None and rule.sees == "jacobian" and self._owner.source == "features":
            raise ValueError(
                'A rule that sees the Jacobian of the features needs all samples in one graph. Use source="parameters" in '
                "collect()."
            )

    def _agreed_seed(self, step: StepLosses, given: StepArguments) -> Seed:
        """Return the gradient with which all passes of the collection begin."""
        seed = seed_of(step, given.enabled_scaler)
        if self._seed is not None and self._seed.scale != seed.scale:
            raise ValueError(
                f"All calls inside of collect() must have one scale of mixed precision, but got {self._seed.scale} and "
                f"{seed.scale}. Give the same scaler to each call, and call scaler.update() after the context."
            )
        self._seed, self._scaler = seed, given.enabled_scaler
        return seed

    def _add_trunk(self, parts: Partition) -> None:
        ids = {id(leaf) for leaf in self._trunk}
        if self._owner.source == "parameters" and ids and ids != {id(leaf) for leaf in parts.trunk}:
            raise ValueError("shared must hold the same parameters in all calls inside of collect().")
        self._trunk += [leaf for leaf in parts.trunk if id(leaf) not in ids]

    def _add_gradients(self, step: StepLosses, parts: Partition, seed: Seed) -> None:
        """Run the backward passes of a micro-batch, one task after the other."""
        tasks = step.indices.tolist()
        outputs = LossOutputs(step.roots, seed.gradient)
        if parts.source == "parameters":
            targets = [*parts.trunk, *parts.heads]
            with self._owner.engine.guarded(outputs, parts):
                for k, gradients in enumerate(sequential_passes(outputs, targets, retain_graph=False)):
                    self._rows.add(tasks[k], targets, gradients, step.counts[k])
            return
        measured = self._owner.engine.measure(outputs, parts, as_matrix=False)
        self._rows.add_products(measured.gramian, tasks, step.counts)
        with self._owner.engine.guarded(outputs, parts):
            for k, gradients in enumerate(sequential_passes(measured.outputs, parts.trunk, retain_graph=False)):
                self._rows.add(tasks[k], parts.trunk, gradients, step.counts[k])
        for k, pairs in enumerate(measured.heads.by_task):
            self._rows.add(tasks[k], [head for head, _ in pairs], [gradient for _, gradient in pairs], step.counts[k])

    def _mean_losses(self) -> StepLosses:
        """Return the mean losses of all micro-batches of this rank."""
        counts = self._sums[1]
        indices = counts.nonzero().flatten()
        means = (self._sums[0] / counts)[indices]
        names = tuple(self._owner.tasks[k] for k in indices.tolist())
        one = torch.ones((), device="cpu") if self._seed is None else self._seed.unit
        known = {"indices": indices, "roots": [None] * len(names), "host": means, "one": one}
        known["counts"] = tuple(counts[indices].tolist())
        return StepLosses(names, len(counts), means.to(one.device), known=known)

    def _heads(self) -> list[Tensor]:
        ids = {id(leaf) for leaf in self._trunk}
        return [leaf for leaf in self._rows.leaves() if id(leaf) not in ids]

    def _mean_extras(self, parameters: list[Tensor], *, has_extra: bool) -> list[LeafGradient]:
        """Return the gradients of the mean extra loss, times the factor."""
        if not has_extra or not (self._num_extras or self._owner.ranks.size > 1):
            return []
        pairs, total = self._extras, float(self._num_extras)
        if self._owner.ranks.size > 1:
            local = {id(leaf): gradient for leaf, gradient in pairs}
            sums = sum_gradients(self._owner.ranks, parameters, [local.get(id(p)) for p in parameters])
            pairs = leaf_gradients(parameters, sums)
            total = float(self._owner.ranks.sum(torch.tensor(total, dtype=torch.float64, device="cpu")))
        return [(leaf, gradient * (self._factor / total)) for leaf, gradient in pairs]
