"""Are samples copies of training slices?

Carlini et al. 2023 (arXiv 2301.13188) and Meehan et al. 2020 (arXiv 2004.05675); the question for diffusion
models, Somepalli et al. 2023 (arXiv 2212.03860).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .distances import check_features


@dataclass(frozen=True)
class Memorisation:
    """What :func:`memorisation` found for every generated image (M,).

    ``ratio``: distance to the nearest training image over that to the nearest held-out one;
    ``nearest``: index of the former; ``flagged``: ratio below ``threshold``, which ``expected`` of images
    of persons never seen would be, too.
    """

    ratio: Tensor
    nearest: Tensor
    threshold: float
    expected: float

    @property
    def flagged(self) -> Tensor:
        return self.ratio < self.threshold

    @property
    def share(self) -> float:
        """Share of generated images that are nearer to training than chance explains."""
        return float(self.flagged.float().mean())


def memorisation(
    generated: Tensor, train: Tensor, held_out: Tensor, unseen: Tensor, *, expected: float = 0.01
) -> Memorisation:
    """Are generated images copies of training images? Vectors (M, D): pixels or features.

    Every training set has a nearest image; the question is whether it is nearer than it would be by chance.
    ``held_out`` and ``unseen`` are two sets of real images of other persons: the ratio of distances to
    the nearest in ``train`` and in ``held_out`` is taken for ``unseen`` first, and the threshold set
    where only the share ``expected`` of them falls below. After the tests of Carlini et al. 2023 and Meehan
    et al. 2020. Raises ``ValueError`` for sets too small for the threshold.
    """
    check_features(generated, train, held_out, unseen)
    if len(unseen) * expected < 1:
        raise ValueError(
            f"{len(unseen)} unseen images cannot set a threshold that {expected:.2%} of them fall below: "
            f"give at least {math.ceil(1 / expected)}."
        )

    def ratio(images: Tensor) -> tuple[Tensor, Tensor]:
        to_train, nearest = nearest_images(images, train)
        return to_train / nearest_images(images, held_out)[0].clamp(min=1e-12), nearest

    found, nearest = ratio(generated)
    return Memorisation(found, nearest, float(ratio(unseen)[0].quantile(expected)), expected)


def nearest_images(images: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to, and index of, the nearest of ``among`` (N, D) for each of ``images`` (M, D)."""
    among = among.double()  # which is nearest must not hang on the last bit of a sum
    found = [torch.cdist(part.double(), among).min(1) for part in images.flatten(1).split(256)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
