"""How a head lies in its planes, as far as anatomy tells: by comparison with the ICBM 152 template.

The template is symmetric, so nobody can tell left from right by it.
"""

from __future__ import annotations

import threading
from functools import cache
from itertools import product

import numpy as np

_STEP = 4  # mm: blocks whose means are compared
_CLEARLY = 0.1  # of correlation; phantoms differ by 0.15 and more from their mirror images
_ONE_LOADS = threading.Lock()


def _blocks(planes: np.ndarray) -> np.ndarray:
    """Means over 4×4 pixels of planes (176, 208, N)."""
    rows, cols = planes.shape[0] // _STEP, planes.shape[1] // _STEP
    return planes.reshape(rows, _STEP, cols, _STEP, -1).mean(axis=(1, 3), dtype=np.float32)


@cache
def _template() -> tuple[np.ndarray, np.ndarray]:
    """The course's planes of the template in blocks, and where its brain is."""
    from nilearn.datasets import load_mni152_template  # seconds

    from .volumes import course_planes

    image = load_mni152_template(resolution=1)
    brain = _blocks(course_planes(np.asarray(image.dataobj), np.linalg.inv(image.affine), order=1))
    return brain, brain > 0.05


def _likeness(planes: np.ndarray) -> float:
    """Correlation with the template in its brain, for planes (176, 208, 32)."""
    with _ONE_LOADS:
        brain, near = _template()
    values = _blocks(planes)[near]
    values = np.minimum(values, np.percentile(values, 98))  # fat is brighter than any brain
    return float(np.corrcoef(values, brain[near])[0, 1]) if values.std() else 0.0


def misplaced(volume: np.ndarray, planes: slice) -> str | None:
    """How a head lies wrongly in a volume (176, 208, Z), or None; ``planes`` are those of the course.

    It is compared with the template as it is, mirrored front to back and top to bottom, and, if it has as
    many planes as rows, with its first and last axes exchanged.
    """
    found = {}
    square = volume.shape[0] == volume.shape[2]
    for exchanged, backwards, upside_down in product((False, True)[: 1 + square], *[(False, True)] * 2):
        turned = volume.transpose(2, 1, 0) if exchanged else volume
        turned = turned[:, :: -1 if backwards else 1, :: -1 if upside_down else 1]
        found[exchanged, backwards, upside_down] = _likeness(turned[:, :, planes])
    best = max(found, key=found.get)
    if found[best] < found[False, False, False] + _CLEARLY:
        return None
    words = ("with its first and last axes exchanged", "mirrored front to back", "upside down")
    return " and ".join(word for word, is_so in zip(words, best) if is_so)
