"""Anatomy of segmented slices: what a radiologist would measure."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from scipy.stats import wasserstein_distance
from torch import Tensor

from .segmenter import Segmenter

DEEP = 20.0  # mm from the outside; CSF below is in the ventricles, CSF above around the brain
PIXEL = 208 / Segmenter.image_size  # mm


def anatomy(classes: Tensor) -> dict[str, Tensor]:
    """What a radiologist would measure, for each segmented slice (B, 64, 64): name → (B,).

    "brain": the brain with its CSF, in cm²; "CSF", "grey", "white": shares of it; "ventricles": the share
    of it that is CSF more than 20 mm from the outside; "symmetry": the share of its pixels whose mirror
    image about the middle line has the same tissue. A slice without brain gives NaN but for "brain".
    """
    classes = classes.cpu()
    inside = classes > 0
    area = inside.flatten(1).sum(1).double()
    shares = {
        name: (classes == tissue).flatten(1).sum(1) / area
        for tissue, name in enumerate(("CSF", "grey", "white"), 1)
    }
    depth = torch.from_numpy(
        np.stack([distance_transform_edt(np.pad(head, 1))[1:-1, 1:-1] for head in inside.numpy()])
    )
    ventricles = ((classes == 1) & (depth * PIXEL > DEEP)).flatten(1).sum(1) / area
    symmetry = torch.stack([_symmetry(slice_) for slice_ in classes])
    return {"brain": area * (PIXEL / 10) ** 2, **shares, "ventricles": ventricles, "symmetry": symmetry}


def _symmetry(classes: Tensor) -> Tensor:
    """The best agreement of one slice with its mirror image, over places of the middle line."""
    # As stored, rows run from left to right.
    inside = classes > 0
    if not inside.any():
        return torch.tensor(float("nan"), dtype=torch.double)
    rows = inside.any(1).nonzero()[:, 0]
    around = int(rows[0] + rows[-1]) - (len(classes) - 1)  # shift that puts the extent onto itself
    found = []
    for shift in range(around - 2, around + 3):
        mirrored = classes.flip(0).roll(shift, 0)
        found.append(((mirrored == classes) & inside).sum() / inside.sum().double())
    return torch.stack(found).max()


def anatomy_distances(real: dict[str, Tensor], generated: dict[str, Tensor]) -> dict[str, float | None]:
    """Wasserstein distance between the distributions of each figure of :func:`anatomy`.

    In deviations of the real ones, so that 0.1 means: on average moved by a tenth of how much heads differ.
    None where no slice of a set has the figure, or all real ones have the same.
    """
    found = {}
    for name, values in real.items():
        a, b = (v[~v.isnan()].numpy() for v in (values, generated[name]))
        known = len(a) and len(b) and a.std() > 0
        found[name] = float(wasserstein_distance(a, b) / a.std()) if known else None
    return found
