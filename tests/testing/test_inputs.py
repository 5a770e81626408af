import pytest
import torch

from balance.testing import KINDS, make_jacobian, make_losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_make_jacobian_is_finite_and_reproducible(kind, num_tasks):
    J = make_jacobian(num_tasks, kind, 3)
    assert J.shape == (num_tasks, max(1, num_tasks - 1) if kind == "low_rank" else num_tasks + 3)
    assert J.dtype == torch.float64
    assert J.isfinite().all()
    assert torch.equal(J, make_jacobian(num_tasks, kind, 3))
    assert not torch.equal(J, make_jacobian(num_tasks, kind, 4)) or (kind, num_tasks) == ("zero_row", 1)


def test_make_jacobian_has_the_property_of_its_kind():
    kinds = {kind: make_jacobian(4, kind, 0) for kind in KINDS}
    assert torch.equal(kinds["duplicate"][0], kinds["duplicate"][1])
    assert torch.equal(-2 * kinds["opposite"][0], kinds["opposite"][1])
    assert 0 < (kinds["near_parallel"][0] - kinds["near_parallel"][1]).norm() < 1e-4
    assert not kinds["zero_row"][0].any()
    assert torch.equal(kinds["integer"], kinds["integer"].round())
    for kind in ("low_rank", "stationary"):
        assert torch.linalg.matrix_rank(kinds[kind]) == 3
    assert torch.linalg.svdvals(kinds["rounded"])[-1] < 1e-5 * torch.linalg.svdvals(kinds["rounded"])[0]


def test_make_losses_are_positive():
    L = make_losses(6, 3, 0)
    assert L.shape == (6, 3)
    assert (L > 0).all()
