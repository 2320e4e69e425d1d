import pytest
import torch

from oasis_helpers.phantoms import make_phantoms

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A small set: two training cases, one each to validate and test, four slices each."""
    return make_phantoms(tmp_path_factory.mktemp("data") / "phantoms", (2, 1, 1), slices=4, workers=1)
