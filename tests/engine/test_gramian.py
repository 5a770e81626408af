"""Gradients by tensor and task, and their inner products."""

import pytest
import torch

from balance import Balancer
from balance.engine.gramian import InnerProducts, TaskRows, multiply_rows, sparse_rows, split_direction, to_vector
from tests.engine.definition import Opaque


def test_loss_jacobian_of_an_operation_that_cannot_be_batched():
    def rule(losses):
        return Opaque.apply(losses) * torch.arange(1.0, 4.0)

    theta = torch.ones(3, requires_grad=True)
    report = Balancer(3, loss=rule, gradient="mgda").backward(theta * torch.tensor([1.0, 2.0, 3.0]), shared=[theta])
    torch.testing.assert_close(report.loss_weights, torch.arange(1.0, 4.0))


def task_rows(num_tasks, lengths, dtype=torch.float64):
    """Return rows of which some are missing, and the Jacobian that they are."""
    generator = torch.Generator().manual_seed(num_tasks)
    by_tensor = [[torch.randn(n, generator=generator, dtype=dtype) for _ in range(num_tasks)] for n in lengths]
    by_tensor[0][-1] = None
    J = torch.cat(
        [
            torch.stack([torch.zeros(n, dtype=dtype) if row is None else row for row in rows])
            for n, rows in zip(lengths, by_tensor, strict=True)
        ],
        dim=1,
    )
    return TaskRows(num_tasks, by_tensor), J


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("lean", [False, True])
def test_inner_products_are_the_gramian(num_tasks, lean):
    rows, J = task_rows(num_tasks, [7, 30_000, 1])
    products = InnerProducts(num_tasks, J.shape[1], J.device, lean=lean)
    for by_task in rows.by_tensor:
        products.add(by_task)
    torch.testing.assert_close(products.total(), J @ J.T)
    torch.testing.assert_close(rows.gramian(J.device), J @ J.T)
    torch.testing.assert_close(rows.squares(J.device), J.square().sum(dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weighted_sums_are_equal_for_numbers_and_tensors(dtype):
    rows, J = task_rows(3, [4, 6], dtype)
    weights = [0.5, -2.0, 3.0]
    wide = torch.promote_types(dtype, torch.float32)
    for given in (weights, torch.tensor(weights)):
        sums = list(rows.weighted_sums(given))
        assert all(total.dtype == wide for total in sums)
        torch.testing.assert_close(torch.cat(sums), torch.tensor(weights).to(wide) @ J.to(wide))


def test_weighted_sum_of_an_unreached_tensor_is_none():
    assert list(TaskRows(2, [[None, None]]).weighted_sums([1.0, 1.0])) == [None]


def test_sparse_rows_are_values_at_the_indices_of_any_task():
    first = torch.sparse_coo_tensor([[4, 1, 1]], torch.tensor([[1.0, 2], [3, 4], [5, 6]]), (5, 2), check_invariants=True)
    second = torch.sparse_coo_tensor([[3]], torch.tensor([[7.0, 8]]), (5, 2), check_invariants=True)
    sparse = sparse_rows([first, None, second])
    assert sparse.indices.tolist() == [[1, 3, 4]]
    assert sparse.rows[1] is None
    for row, gradient in ((sparse.rows[0], first), (sparse.rows[2], second)):
        assert torch.equal(sparse.gradient(row).to_dense(), gradient.to_dense())
    assert sparse_rows([first, torch.ones(5, 2)]) is None
    assert sparse_rows([None, None]) is None


def test_vector_keeps_no_larger_storage_alive():
    batch = torch.randn(10, 4)
    assert to_vector(batch[0], sharers=10).data_ptr() == batch.data_ptr()
    assert to_vector(batch[0]).data_ptr() != batch.data_ptr()


def test_direction_is_split_into_the_shapes_of_tensors():
    tensors = [torch.ones(2, 3), torch.ones(4), torch.ones(())]
    pieces = split_direction(torch.arange(11.0), tensors, [True, False, True])
    assert pieces[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert pieces[1] is None
    assert pieces[2] == 10


def test_rows_are_multiplied_in_place():
    J, matrix = torch.randn(3, 50_000), torch.randn(3, 3)
    expected = matrix @ J
    multiply_rows(J, matrix)
    torch.testing.assert_close(J, expected)
