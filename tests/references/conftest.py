import pytest

from tests.references import GOLDEN


@pytest.fixture
def rows():
    return GOLDEN["loss_methods"]["losses_rows_0_to_6"]


@pytest.fixture
def sequences():
    return GOLDEN["loss_methods"]["methods"]
