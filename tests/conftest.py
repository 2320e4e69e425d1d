from functools import cache

import pytest
import torch

from oasis_helpers.intake import phantoms as module

torch.set_num_threads(1)
module._load_template = cache(module._load_template)  # seconds each time, and always the same


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A small set: two training cases, one each to validate and test, four slices each."""
    return module.make_phantoms(tmp_path_factory.mktemp("data") / "phantoms", (2, 1, 1), slices=4, workers=1)
