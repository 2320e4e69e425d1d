"""pytest --nbval, made strict about pictures.

nbval compares text but no PNG, so a wrong or missing picture would pass. Here every picture of
a cell is compared with the stored one, and a cell that was stored without being run fails.
"""

import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tests"))

from notebook_tools import kernel_environment, picture_difference, pictures

os.environ.update(kernel_environment())
os.environ.pop("OASIS_ROOT", None)


def _compare(cell, text_agrees, fresh, stored, skip_compare=None):
    """nbval's own comparison, then the pictures."""
    if not text_agrees(fresh, stored, skip_compare):
        return False
    old, new = pictures(stored), pictures(fresh)
    if len(old) != len(new):
        cell.comparison_traceback.append(f"{len(new)} pictures instead of {len(old)}")
        return False
    for number, (a, b) in enumerate(zip(old, new)):
        if difference := picture_difference(a, b):
            cell.comparison_traceback.append(f"picture {number} differs from the stored one: {difference}")
            return False
    return True


def pytest_collection_modifyitems(items):
    for item in items:
        if type(item).__name__ == "IPyNbCell":
            item.compare_outputs = functools.partial(_compare, item, item.compare_outputs)
