from functools import cache

import pytest
import torch
from oasis_like import phantom_volume

from oasis_helpers import phantoms as public
from oasis_helpers.intake import phantoms as module

torch.set_num_threads(1)
module._load_template = cache(module._load_template)  # seconds each time, and always the same


@pytest.fixture(autouse=True)
def _no_fresh_heads(monkeypatch):
    """A test that wants the heads of a report gives a few of its own: the real ones take minutes."""

    def refused():
        raise AssertionError("a unit test asked for 1,200 fresh heads")

    for place in (module, public):  # whichever is imported first, and whenever
        monkeypatch.setattr(place, "fresh_heads", refused)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A small set: two training cases, one each to validate and test, four slices each."""
    return module.make_phantoms(tmp_path_factory.mktemp("data") / "phantoms", (2, 1, 1), slices=4, workers=1)


@pytest.fixture(scope="session")
def head():
    """Head and labels of one phantom on the T88 grid."""
    return phantom_volume()
