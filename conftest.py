"""pytest --nbval, made strict about pictures, and fair about what training gives.

nbval compares text but no PNG, so a wrong or missing picture would pass. Here every picture of
a cell is compared with the stored one, and a cell that was stored without being run fails.

A hundred steps of training turn the last bit of a sum, which another processor rounds otherwise, into
a per cent of the loss. Cells with the tag "trained", which show what such a network does, may differ in
their numbers and in shades of their pictures by somewhat more than that; words may not.
"""

import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tests"))

from notebook_tools import TRAINED, kernel_environment, picture_difference, pictures, with_stored_numbers

MESSAGE_TIMEOUT = (
    120  # seconds that nbval waits for each message of a kernel that has answered; its own are 5
)

os.environ.update(kernel_environment())
os.environ.pop("OASIS_ROOT", None)


def _compare(cell, text_agrees, fresh, stored, skip_compare=None):
    """nbval's own comparison, then the pictures."""
    trained = TRAINED in cell.cell.metadata.get("tags", [])
    if not text_agrees(with_stored_numbers(fresh, stored) if trained else fresh, stored, skip_compare):
        return False
    old, new = pictures(stored), pictures(fresh)
    if len(old) != len(new):
        cell.comparison_traceback.append(f"{len(new)} pictures instead of {len(old)}")
        return False
    for number, (a, b) in enumerate(zip(old, new)):
        if difference := picture_difference(a, b, trained):
            cell.comparison_traceback.append(f"picture {number} differs from the stored one: {difference}")
            return False
    return True


def pytest_collection_modifyitems(items):
    for item in items:
        if type(item).__name__ == "IPyNbCell":
            item.compare_outputs = functools.partial(_compare, item, item.compare_outputs)
            item.output_timeout = MESSAGE_TIMEOUT
