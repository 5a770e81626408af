import pytest
import torch

from balance.testing import make_jacobian
from tests.gradient.directions import build, direction


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 8])
def test_the_replaced_gradients_are_orthogonal_and_of_equal_length(num_tasks):
    """Rows of the matrix from gradients to replaced gradients come from unit preferences."""
    J = make_jacobian(num_tasks, "generic", 0)
    almost_zero = 1e-12
    rows = []
    for task in range(num_tasks):
        preference = [1.0 if k == task else almost_zero for k in range(num_tasks)]
        rows.append(build("aligned_mtl", num_tasks, preference=preference)(J @ J.T) @ J)
    replaced = torch.stack(rows)
    smallest = torch.linalg.eigvalsh(J @ J.T)[0]
    torch.testing.assert_close(
        replaced @ replaced.T, smallest * torch.eye(num_tasks, dtype=torch.float64), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(("mode", "scale"), [("min", 1.0), ("median", 2.0), ("rmse", 9.5**0.5)])
def test_scale_modes(mode, scale):
    """Orthogonal gradients of lengths 1, 2, 3 and 24 ** 0.5: eigenvalues 1, 4, 9, 24, of which 4 is the lower median."""
    J = torch.tensor([1.0, 2.0, 3.0, 24**0.5], dtype=torch.float64).diag()
    torch.testing.assert_close(direction("aligned_mtl", J, scale_mode=mode), torch.full((4,), scale / 4, dtype=torch.float64))


def test_eigenvalues_below_the_rounding_of_the_gramian_count_as_zero():
    J = torch.tensor([[1.0, 2.0], [2.0, 4.0], [-1.0, 1.0]])
    single, double = build("aligned_mtl", 3)(J @ J.T), build("aligned_mtl", 3)(J.double() @ J.double().T)
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-6)
