import pytest
import torch

from tests.gradient.directions import build


def test_graddrop_refuses_a_tensor_that_is_no_matrix():
    with pytest.raises(ValueError, match="shape"):
        build("graddrop", 2)(torch.ones(3))
