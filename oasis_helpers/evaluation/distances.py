"""Distances of two sets of images, in the features of the segmenter, and intervals for them.

Sources: KID, Bińkowski et al. 2018 (arXiv 1801.01401); FID, Heusel et al. 2017 (arXiv 1706.08500);
precision and recall, Kynkäänniemi et al. 2019 (arXiv 1904.06991); density and coverage, Naeem et al. 2020
(arXiv 2002.09797); MS-SSIM, Wang et al. 2003 (Asilomar 37, 1398), of pairs of samples, Odena et al. 2017
(arXiv 1610.09585); bootstrap, Efron 1979 (Ann. Statist. 7, 1); jackknife, Efron & Stein 1981
(Ann. Statist. 9, 586).

``cases`` says of two sets which head each image is of. Two slices of one head are more alike than slices of
two heads, so within a set a pair of them says nothing about the distribution, and KID, precision and recall
leave it out. Labels are compared within a set only: no head may be in both sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from ..seeds import generator
from .segmenter import check_images

NEIGHBOURS = 5  # whose distance is the radius of an image's ball
HEADS = 3  # fewest of a set: two make a pair, and the jackknife leaves one out

Cases = tuple[Sequence[int], Sequence[int]]


class _Features(nn.Module):
    """What torchmetrics asks of a feature network; here the features are computed already."""

    def __init__(self, size: int):
        super().__init__()
        self.num_features = size

    def forward(self, x: Tensor) -> Tensor:
        return x


def check_features(*sets: Tensor) -> None:
    """``ValueError`` unless all sets are finite numbers (N, D) of the same D."""
    for features in sets:
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(
                f"features are {features.dtype} of shape {tuple(features.shape)}: "
                "give float (N, D), what embed returns."
            )
        if not features.isfinite().all():
            raise ValueError(
                "features hold NaN or infinity: the images or the network that made them are broken."
            )
    if len({features.shape[1] for features in sets}) > 1:
        dimensions = ", ".join(str(features.shape[1]) for features in sets)
        raise ValueError(f"features have {dimensions} dimensions: they come from different networks.")


def _heads(features: Tensor, cases: Sequence[int] | None) -> Tensor:
    """The number, from 0, of the head of each of the images: long (N,); without ``cases`` each is its own."""
    if cases is None:
        return torch.arange(len(features), device=features.device)
    if len(cases) != len(features):
        raise ValueError(f"there are {len(features)} images and {len(cases)} cases: give one case an image.")
    return torch.as_tensor(cases, device=features.device).unique(return_inverse=True)[1]


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)


def kid(real: Tensor, generated: Tensor, *, cases: Cases | None = None) -> tuple[float, float]:
    """Kernel distance of two sets of features (N, D) and (M, D), and its standard error.

    The unbiased squared MMD with the kernel (x·y/D + 1)³ over all pairs of images, Bińkowski et al. 2018,
    eq. 4; within a set over pairs of different heads, which ``cases`` names (without: each image is its
    own). 0 on average, and so often below, for two sets of one distribution, however large. The error is
    the jackknife's over heads (Efron & Stein 1981), of both sets together; about √2 too large where the
    distance is 0. Raises ``ValueError`` for fewer than three heads, and for features that do not belong
    together.
    """
    x, y, *heads = _checked_pair(real, generated, cases)
    sums = [
        _Sums(_row_sums(a, own, a, own), _row_sums(a, own, b), own, len(b))
        for a, b, own in ((x, y, heads[0]), (y, x, heads[1]))
    ]
    value = sums[0].within + sums[1].within - 2 * sums[0].across
    return value, sum(s.variance for s in sums) ** 0.5


def _checked_pair(
    real: Tensor, generated: Tensor, cases: Cases | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both sets in double precision, and the heads of their images, if KID can be computed of them."""
    check_features(real, generated)
    heads = [_heads(f, c) for f, c in zip((real, generated), cases or (None, None))]
    counts = [len(h.unique()) for h in heads]
    if min(counts) < HEADS:
        raise ValueError(
            f"{len(real)} real images of {counts[0]} heads and {len(generated)} generated of {counts[1]} are "
            f"too few for KID: give images of at least {HEADS} heads each."
        )
    return real.double(), generated.double(), *heads


def _row_sums(a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor | None = None) -> Tensor:
    """Σ_j k(a_i, b_j) for each i, (N,); with ``of_b`` over images of other heads only."""
    found = []
    for part, own in zip(a.split(1024), of_a.split(1024)):
        kernel = _kernel(part, b)
        found.append((kernel if of_b is None else kernel.masked_fill_(own[:, None] == of_b, 0)).sum(1))
    return torch.cat(found)


class _Sums:
    """What one set gives to KID: the mean of the kernel within it and across, and the variance due to it."""

    def __init__(self, within: Tensor, across: Tensor, heads: Tensor, others: int):
        images = heads.bincount().double()
        total, pairs = images.sum(), images.sum() ** 2 - (images**2).sum()
        self.within = float(within.sum() / pairs)
        self.across = float(across.sum() / (total * others))
        # without one head: its rows go, and its columns, which have the same sum
        kept = (within.sum() - 2 * heads.bincount(within)) / (pairs - 2 * images * (total - images))
        without = kept - 2 * (across.sum() - heads.bincount(across)) / ((total - images) * others)
        self.variance = float((len(images) - 1) * without.var(correction=0))


class KernelDistance:
    """KID of resamples of two sets, from kernel matrices that are computed once: see :func:`kid_of`."""

    def __init__(self, real: Tensor, generated: Tensor, cases: Cases | None = None):
        x, y, *self._heads = _checked_pair(real, generated, cases)
        self._within = [
            _kernel(a, a).masked_fill_(own[:, None] == own, 0) for a, own in zip((x, y), self._heads)
        ]
        self._across = _kernel(x, y)

    def __call__(self, real: Tensor, generated: Tensor) -> float:
        """KID of the images with these indices, (n,) and (m,); NaN where all of a set are of one head."""
        drawn = [i.bincount(minlength=len(own)).double() for i, own in zip((real, generated), self._heads)]
        found = -2 * drawn[0] @ self._across @ drawn[1] / (len(real) * len(generated))
        for times, kernel, own in zip(drawn, self._within, self._heads):
            pairs = times.sum() ** 2 - (own.bincount(times) ** 2).sum()
            found = found + times @ kernel @ times / pairs  # 0 / 0 is NaN
        return float(found)


def kid_of(real: Tensor, generated: Tensor, *, cases: Cases | None = None) -> KernelDistance:
    """:func:`kid` of any resample of two sets of features (N, D), (M, D), for :func:`bootstrap`.

    The result takes one tensor of indices a set, and leaves out all pairs of one original head, also of an
    image with itself where a head was drawn twice: the mean over resamples is then the distance itself. It
    holds N² + M² + NM numbers. Raises as :func:`kid`.
    """
    return KernelDistance(real, generated, cases)


def fid(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance of two sets of features (N, D) and (M, D): Heusel et al. 2017, eq. 6, by torchmetrics.

    The squared distance of the two normal distributions with the same means and covariances. Always
    above 0, and larger for fewer images: compare only figures of equally large sets. Raises
    ``ValueError`` for fewer than D + 1 images, whose covariance is not of full rank.
    """
    check_features(real, generated)
    least = real.shape[1] + 1
    if min(len(real), len(generated)) < least:
        raise ValueError(
            f"{len(real)} real and {len(generated)} generated images are too few for FID in "
            f"{real.shape[1]} dimensions: give at least {least} of each, or use kid."
        )
    metric = FrechetInceptionDistance(_Features(real.shape[1]))
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return float(metric.compute())


def precision_recall(
    real: Tensor,
    generated: Tensor,
    k: int = NEIGHBOURS,
    *,
    cases: Cases | None = None,
) -> dict[str, float]:
    """Fidelity and diversity apart: precision, recall, density and coverage of features (N, D), (M, D).

    A set's region is the union of a ball around each point, as large as the distance to its k-th neighbour.
    Precision: the share of generated images in the real region; recall: of real images in the generated one
    (Kynkäänniemi et al. 2019). Density: how many real balls a generated image lies in, over k; coverage:
    the share of real balls with a generated image in them (Naeem et al. 2020, which mend what a single
    outlier does to the first two). ``cases``, of the real and of the generated images: neighbours are then
    sought in other cases, for those of a slice are mostly slices of its own head, and sets with more slices
    of a head would get smaller balls. Balls are smaller in larger sets, too: compare only figures of
    equally large sets. Raises ``ValueError`` for too few images to have k neighbours.
    """
    check_features(real, generated)
    if min(len(real), len(generated)) <= k + 1:
        raise ValueError(
            f"{len(real)} real and {len(generated)} generated images are too few for {k} neighbours each."
        )
    real, generated = real.double(), generated.double()  # a count must not hang on the last bit of a sum
    of_real, of_generated = (_heads(f, c) for f, c in zip((real, generated), cases or (None, None)))
    radius_real, radius_generated = _radius(real, k, of_real), _radius(generated, k, of_generated)
    distances = torch.cdist(real, generated)
    in_real = distances <= radius_real[:, None]
    return {
        "precision": float(in_real.any(0).float().mean()),
        "recall": float((distances <= radius_generated[None]).any(1).float().mean()),
        "density": float(in_real.float().sum(0).mean() / k),
        "coverage": float(in_real.any(1).float().mean()),
    }


def _radius(points: Tensor, k: int, heads: Tensor) -> Tensor:
    """Distance (N,) from each point (N, D) to its k-th neighbour of another head."""
    radius = torch.cdist(points, points).masked_fill(heads[:, None] == heads, torch.inf).kthvalue(k).values
    if not radius.isfinite().all():
        raise ValueError(f"some images have fewer than {k} others in other cases: load more cases.")
    return radius


def ms_ssim(images: Tensor, *, pairs: int = 200, seed: int = 0) -> float:
    """Likeness of random pairs among images (B, 1, 64, 64): 1 is one image over and over.

    The mean multi-scale structural similarity (Wang et al. 2003) by torchmetrics, with the first three of
    its five scales, which is as many as 64 pixels have; as a measure of diversity, Odena et al. 2017.
    """
    check_images(images, least=2)
    drawn = generator(seed)
    first = torch.randint(0, len(images), (pairs,), generator=drawn)
    second = (first + torch.randint(1, len(images), (pairs,), generator=drawn)) % len(images)
    weights = torch.tensor([0.0448, 0.2856, 0.3001])
    return float(
        multiscale_structural_similarity_index_measure(
            images[first], images[second], data_range=2.0, betas=tuple((weights / weights.sum()).tolist())
        )
    )


def bootstrap(
    statistic: Callable[..., float],
    *cases: Sequence[int],
    rounds: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """An interval for a figure, by drawing whole cases again with replacement: Efron 1979 (percentiles).

    ``cases``: for each set the case of every image; the slices of one head are no independent
    observations, so they come or stay away together (for generated images, each its own case).
    ``statistic`` gets one tensor of indices a set and returns the figure, or NaN for a draw that has none.
    A case drawn twice meets itself, which makes sets look less alike: take :func:`kid_of`, which leaves
    such pairs out. Two figures that share a set are compared by the interval of their difference, not by
    whether their intervals overlap: let one ``statistic`` compute both from the same indices of that set.
    NaN where no draw has the figure.
    """
    drawn = generator(seed)
    places = [_places(torch.as_tensor(labels)) for labels in cases]
    found = []
    for _ in range(rounds):
        indices = []
        for groups in places:
            picked = torch.randint(0, len(groups), (len(groups),), generator=drawn)
            indices.append(torch.cat([groups[i] for i in picked.tolist()]))
        found.append(statistic(*indices))
    known = [value for value in found if value == value] or [np.nan]
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _places(labels: Tensor) -> list[Tensor]:
    """Where each label stands: one tensor of indices a label."""
    return [(labels == label).nonzero()[:, 0] for label in labels.unique()]
