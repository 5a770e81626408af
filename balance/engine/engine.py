"""Task gradients of one step: the choice of the backward passes, and of the gradients to keep in memory."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from .accumulate import without_hooks
from .batching import Batching
from .custom_functions import FunctionChecks, with_explained_errors
from .gramian import HeadGradients, InnerProducts, TaskRows, to_vector
from .graph import last_uses, unpacks_saved_tensors
from .joint import can_join, joint_pass
from .layers import MeasuredTensor, measured_tensors
from .matrix_gradients import MatrixGradients, is_small, matrix_of_rows, matrix_of_stacks
from .over_ranks import GlobalGradients, sum_passes
from .passes import FeatureOutputs, LossOutputs, SampleOutputs, places_by_task, sequential_passes
from .per_sample import measure_samples
from .task_gradients import TaskGradients, common_indices

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from ..distributed.ranks import Ranks
    from ..types import EngineChoice, Memory
    from .accumulate import LeafGradient
    from .graph import Root
    from .partition import Partition
    from .passes import Outputs

# Gradients to keep: rows by tensor and task, one matrix, or only their inner products
Storage = Literal["rows", "matrix", "products"]

_SHARE = 0.4  # of the Jacobian: limit of its part in memory with memory="gramian", unless a single parameter is larger
_FEW = 0.1  # of the shared parameters: fewer features may be kept for every task


class Estimate(NamedTuple):
    """Memory for the gradients that a step keeps in addition to the gradients of an ordinary backward pass, in bytes.

    It excludes the gradients of the heads, and the activations that K passes must keep until the last of them.

    Attributes:
        bytes: As the balancer is configured.
        jacobian: At most, with ``memory="jacobian"``: one gradient of all shared parameters for each task.
        gramian: At most, with ``memory="gramian"``.
        passes: Form of the K passes through the trunk at the last step, ``"loop"`` or ``"batched"``, which ``engine="auto"``
            chooses; None where no such passes have run.
    """

    bytes: int
    jacobian: int
    gramian: int
    passes: Literal["loop", "batched"] | None = None


class _PassPlan(NamedTuple):
    """Passes to run, and the gradients to keep.

    Attributes:
        outputs: The outputs at which the passes begin.
        partition: Leaves of the graph.
        blocks: Tensors that are measured in the same passes, block by block.
        heads: Task-specific parameters, which are measured with the first block.
        storage: Gradients to keep.
        retain_graph: A further pass follows.
        batched: The passes of all tasks run in one batch, if possible.
        ranks: Ranks over which the gradients are summed; None: they stay on this rank.
        keeps_graph: The whole graph is retained, not only what a further pass of this step needs.
        computed: By task, gradients of all tensors and heads that passes have computed; None: they are still to run.
    """

    outputs: Outputs
    partition: Partition
    blocks: Sequence[Sequence[MeasuredTensor]]
    heads: Sequence[Tensor]
    storage: Storage
    retain_graph: bool = False
    batched: bool = False
    ranks: Ranks | None = None
    keeps_graph: bool = False
    computed: Sequence[Sequence[Tensor | None]] | None = None

    def heads_of(self, number: int) -> Sequence[Tensor]:
        """Return the heads that are measured with a block, given by its number."""
        return self.heads if number == 0 else ()

    def retains_after(self, number: int) -> bool:
        """Return whether the graph is retained after the passes to a block."""
        return self.retain_graph or self.storage == "products" or number < len(self.blocks) - 1

    @property
    def is_disjoint(self) -> bool:
        """Return whether each pass can free its part of the graph above the features; only the rest is retained."""
        frees = self.retain_graph and not self.keeps_graph
        return frees and self.partition.is_disjoint and bool(self.partition.features)


class Engine:
    """Computation of the task gradients of a balancer.

    Args:
        choice: Form of the K passes: one after the other, in one batch, or chosen automatically.
        memory: Gradients that may be kept in memory: all of them, or a part from which the Gramian is computed.
    """

    def __init__(self, choice: EngineChoice, memory: Memory) -> None:
        self.choice, self.memory = choice, memory
        self._function_checks = FunctionChecks()
        self._batching = Batching(choice)

    def __reduce__(self) -> tuple[type[Engine], tuple[EngineChoice, Memory]]:
        return Engine, (self.choice, self.memory)  # a copy checks its graphs anew

    def measure(
        self,
        outputs: LossOutputs,
        partition: Partition,
        *,
        as_matrix: bool,
        retain_graph: bool = False,
        ranks: Ranks | None = None,
        roots: Sequence[Tensor] | None = None,
    ) -> TaskGradients:
        """Compute the gradients of all tasks.

        Args:
            outputs: The losses.
            partition: Leaves of the graph.
            as_matrix: Return the Jacobian as one matrix (K, P).
            retain_graph: Retain the graph after the passes.
            ranks: Ranks over whose batches the losses are means; None: only one process.
            roots: For each of ``partition.inputs``, factors on its coordinates for the inner products; None: 1.

        Returns:
            The gradients of the losses.

        Raises:
            RuntimeError: If the graph cannot be walked once for each task; ``.grad`` is then as before.
        """
        if isinstance(outputs, SampleOutputs) and ranks is None and not as_matrix:
            samples = None if roots is not None else measure_samples(outputs, partition, retain_graph=retain_graph)
            if samples is not None:
                return samples
        with self.guarded(outputs, partition):
            if partition.source == "features":
                gradients = self._measured_at_features(outputs, partition, as_matrix=as_matrix, keeps_graph=retain_graph)
                return gradients if ranks is None else GlobalGradients.of(gradients, ranks)
            storage: Storage = "matrix" if as_matrix else self._storage(partition)
            batched = self._batching.is_chosen(outputs, partition)
            is_plain = storage == "rows" and ranks is None and roots is None
            if is_plain and is_small(partition, outputs.num_tasks, batched=batched):
                return self._measured_small(outputs, partition, retain_graph=retain_graph, batched=batched)
            if as_matrix or ranks is not None or roots is not None:  # a layer's outputs on two ranks have no sum
                tensors = _without_layers(partition.inputs, roots)
            else:
                tensors = measured_tensors(partition.lower_graph, partition.inputs, outputs.num_tasks)
            plan = _PassPlan(outputs, partition, [], partition.heads, storage, retain_graph, batched, ranks, retain_graph)
            return self._measured_at_parameters(plan, tensors)

    def guarded(self, outputs: LossOutputs, partition: Partition) -> ExitStack:
        """Return an open context for passes, in which leaf tensors have no hooks and custom functions are checked.

        Args:
            outputs: The losses.
            partition: Leaves of the graph.
        """
        functions = partition.upper_graph.functions if partition.source == "features" else partition.functions
        leaves, targets = [*partition.trunk, *partition.heads], [*partition.inputs, *partition.heads]
        with ExitStack() as stack:
            stack.enter_context(without_hooks(leaves))
            if functions:
                stack.enter_context(self._function_checks.guarded(functions, outputs, targets, leaves))
            return stack.pop_all()

    def estimate(self, inputs: Sequence[Tensor], trunk: Sequence[Tensor], num_tasks: int, *, in_blocks: bool) -> Estimate:
        """Return the memory for the gradients of a step.

        Args:
            inputs: Tensors on which conflict is measured.
            trunk: Parameters that get the direction.
            num_tasks: Number of tasks, K.
            in_blocks: Whether the tensors can be measured block by block.
        """
        stored = num_tasks * _num_bytes(inputs)
        largest = max((p.numel() * p.element_size() for p in inputs), default=0)
        least = min(num_tasks * max(int(_SHARE * _num_bytes(trunk)), largest), stored) if in_blocks else stored
        return Estimate(least if self.memory == "gramian" else stored, stored, least, self._batching.last)

    def _measured_small(self, outputs: Outputs, partition: Partition, *, retain_graph: bool, batched: bool) -> TaskGradients:
        """Measure few gradients, which are kept in one matrix if they are dense."""
        inputs, K = partition.inputs, outputs.num_tasks
        plan = _PassPlan(outputs, partition, [], partition.heads, "rows", retain_graph, batched, keeps_graph=retain_graph)
        heads = HeadGradients([])
        if batched and partition.features:
            plan, heads = self._below_features(plan)
            stacks = self._batching.stacks(plan.outputs, partition, inputs, retain_graph=retain_graph)
            if stacks is not None and _has_sparse(*heads.by_task):
                return self._collected(plan._replace(blocks=[_without_layers(inputs)], computed=stacks.rows()), heads)
            if stacks is not None:
                matrix = matrix_of_stacks(inputs, stacks.by_target, K)
                return MatrixGradients.of(plan.outputs, partition, matrix, stacks.reached_by, heads)
        computed = list(self._passes(plan, [*inputs, *plan.heads], retain_graph=retain_graph))
        if any([gradient is not None and gradient.is_sparse for row in computed for gradient in row]):  # noqa: C419
            return self._collected(plan._replace(blocks=[_without_layers(inputs)], computed=computed), heads)
        for task, row in enumerate(computed):
            heads.add(task, plan.heads, row[len(inputs) :])
        reached_by = [[gradient is not None for gradient in by_task] for by_task in zip(*computed, strict=True)]
        matrix = matrix_of_rows(inputs, computed)
        return MatrixGradients.of(plan.outputs, partition, matrix, reached_by[: len(inputs)], heads)

    def _measured_at_features(
        self, outputs: Outputs, partition: Partition, *, as_matrix: bool, keeps_graph: bool
    ) -> TaskGradients:
        storage: Storage = "matrix" if as_matrix else "rows"
        block = _without_layers(partition.inputs)
        plan = _PassPlan(outputs, partition, [block], partition.heads, storage, retain_graph=True, keeps_graph=keeps_graph)
        heads = None
        if can_join(outputs, partition):
            assert isinstance(outputs, LossOutputs)
            computed, heads = joint_pass(outputs, partition, retain_graph=keeps_graph)
            plan = plan._replace(computed=computed, heads=[])
        gradients = self._collected(plan, heads)
        if gradients.rows is not None and partition.features:
            gradients.outputs = FeatureOutputs(partition.features, gradients.rows)
        return gradients

    def _measured_at_parameters(self, plan: _PassPlan, tensors: list[MeasuredTensor]) -> TaskGradients:
        partition, storage = plan.partition, plan.storage
        plan = plan._replace(blocks=[tensors] if storage == "matrix" else self._blocks(partition, tensors, storage))
        if partition.features and (plan.batched or (storage == "products" and _has_few_features(partition))):
            return self._measured_through_features(plan)
        return self._collected(plan)

    def _measured_through_features(self, plan: _PassPlan) -> TaskGradients:
        """Run the passes of a plan in two parts: once down to the features, and from there."""
        below, heads = self._below_features(plan)
        gradients = self._collected(below, heads)
        if plan.storage != "products":
            assert isinstance(below.outputs, FeatureOutputs)
            below.outputs.rows.by_tensor.clear()
        return gradients

    def _below_features(self, plan: _PassPlan) -> tuple[_PassPlan, HeadGradients]:
        """Run the passes of a plan down to the features; return the plan for the rest, and the gradients of the heads."""
        if can_join(plan.outputs, plan.partition):
            assert isinstance(plan.outputs, LossOutputs)
            computed, heads = joint_pass(plan.outputs, plan.partition, retain_graph=plan.keeps_graph)
            by_feature = [[None if row is None else to_vector(row) for row in rows] for rows in zip(*computed, strict=True)]
            rows = TaskRows(plan.outputs.num_tasks, by_feature)
            return plan._replace(outputs=FeatureOutputs(plan.partition.features, rows), heads=[]), heads
        at_features = plan.partition._replace(inputs=plan.partition.features)
        upper = self._measured_at_features(plan.outputs, at_features, as_matrix=False, keeps_graph=plan.keeps_graph)
        return plan._replace(outputs=upper.outputs, heads=[]), upper.heads

    def _storage(self, partition: Partition) -> Storage:
        if len(partition.inputs) < len(partition.trunk):
            return "products"  # gradients of a part do not make a direction for the whole
        # Every further pass would recompute all checkpointed activations, and keep also the unused ones
        return "products" if self.memory == "gramian" and not unpacks_saved_tensors(partition.lower_graph) else "rows"

    def _blocks(self, partition: Partition, tensors: Sequence[MeasuredTensor], storage: Storage) -> list[list[MeasuredTensor]]:
        """Return tensors that are measured in the same passes, those used last in the forward pass first."""
        if self.memory != "gramian" or storage != "products":
            return [list(tensors)]
        limit = _SHARE * sum(p.numel() for p in partition.trunk)
        uses = last_uses(partition.lower_graph, partition.inputs)
        blocks: list[list[MeasuredTensor]] = [[]]
        for tensor in sorted(tensors, key=lambda tensor: -uses[tensor.position]):
            if blocks[-1] and sum(other.row_length for other in blocks[-1]) + tensor.row_length > limit:
                blocks.append([])
            blocks[-1].append(tensor)
        return blocks

    def _collected(self, plan: _PassPlan, heads: HeadGradients | None = None) -> TaskGradients:
        """Run the passes of a plan, block by block of its tensors.

        Args:
            plan: The plan.
            heads: Gradients of the heads, if earlier passes have computed them.

        Returns:
            The gradients.
        """
        K, inputs = plan.outputs.num_tasks, plan.partition.inputs
        device = inputs[0].device if inputs else plan.outputs.device
        gradients = TaskGradients(plan.outputs, plan.partition, [[False] * K for _ in inputs])
        gradients.gramian = torch.zeros(K, K, dtype=torch.float64, device=device)
        if plan.storage == "matrix":
            gradients.allocate_jacobian(device)
        if heads is not None:
            gradients.heads = heads
        if plan.ranks is not None:
            return self._collected_over_ranks(plan, gradients, plan.ranks)
        length = sum(tensor.row_length for block in plan.blocks for tensor in block)
        products = InnerProducts(K, length, device, lean=self.memory == "gramian")
        for number, block in enumerate(plan.blocks):
            tensors, rows = self._collected_block(plan, gradients, number, [tensor.with_inputs() for tensor in block])
            gradients.note_reached(tensors, rows)
            for tensor, by_task in zip(tensors, rows.by_tensor, strict=True):
                products.add(tensor.coordinates(by_task))
                if plan.storage == "products":
                    by_task.clear()
            if plan.storage != "products":
                gradients.rows, gradients.tensors = rows, tensors
        gradients.gramian = products.total()
        return gradients

    def _collected_block(
        self, plan: _PassPlan, gradients: TaskGradients, number: int, tensors: Sequence[MeasuredTensor]
    ) -> tuple[list[MeasuredTensor], TaskRows]:
        """Run the passes down to one block of tensors; return the tensors, with the indices of sparse gradients, and rows."""
        K, heads = plan.outputs.num_tasks, plan.heads_of(number)
        targets = [*(tensor.target for tensor in tensors), *heads]
        rows = TaskRows(K, [[] for _ in tensors])
        for task, computed in enumerate(self._passes(plan, targets, retain_graph=plan.retains_after(number))):
            gradients.store(task, computed, tensors, rows, sharers=K if plan.batched else 1)
            gradients.heads.add(task, heads, computed[len(tensors) :])
        return common_indices(tensors, rows), rows

    def _collected_over_ranks(self, plan: _PassPlan, gradients: TaskGradients, ranks: Ranks) -> GlobalGradients:
        """Run the passes of a plan, and sum the gradients over ranks meanwhile."""
        K, sharded = plan.outputs.num_tasks, None
        for number, block in enumerate(plan.blocks):
            heads = plan.heads_of(number)
            targets = [*(tensor.target for tensor in block), *heads]
            passes = self._passes(plan, targets, retain_graph=plan.retains_after(number))
            if plan.storage == "matrix":
                rows = TaskRows(K, [[] for _ in block])
                for task, computed in enumerate(passes):
                    gradients.store(task, computed, block, rows, sharers=1)
                    gradients.heads.add(task, heads, computed[len(block) :])
                gradients.note_reached(block, rows)
                continue
            sharded = sum_passes(passes, gradients, block, heads, ranks)
            gradients.gramian += sharded.gramian()
        return GlobalGradients.of(gradients, ranks, sharded if plan.storage == "rows" else None)

    def _passes(self, plan: _PassPlan, targets: Sequence[Root], *, retain_graph: bool) -> Iterable[Sequence[Tensor | None]]:
        if plan.computed is not None:
            return plan.computed
        if plan.batched and self._batching.can_run:
            stacks = self._batching.stacks(plan.outputs, plan.partition, targets, retain_graph=retain_graph)
            if stacks is not None:
                return stacks.rows()
        places = places_by_task(plan.outputs, plan.partition.upper_graph, plan.heads, targets)
        passes = sequential_passes(plan.outputs, targets, places, retain_graph=retain_graph, disjoint=plan.is_disjoint)
        return with_explained_errors(passes)


def _without_layers(tensors: Sequence[Tensor], roots: Sequence[Tensor] | None = None) -> list[MeasuredTensor]:
    return [MeasuredTensor(i, tensor, root=None if roots is None else roots[i]) for i, tensor in enumerate(tensors)]


def _has_sparse(*by_task: Iterable[LeafGradient]) -> bool:
    return any(gradient.is_sparse for pairs in by_task for _, gradient in pairs)


def _has_few_features(partition: Partition) -> bool:
    return sum(z.numel() for z in partition.features) <= _FEW * sum(p.numel() for p in partition.trunk)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
