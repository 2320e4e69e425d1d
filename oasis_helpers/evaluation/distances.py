"""Distances of two sets of images, in the features of the segmenter, and intervals for them.

Sources: KID, Bińkowski et al. 2018 (arXiv 1801.01401); FID, Heusel et al. 2017 (arXiv 1706.08500);
precision and recall, Kynkäänniemi et al. 2019 (arXiv 1904.06991); density and coverage, Naeem et al. 2020
(arXiv 2002.09797); MS-SSIM, Wang et al. 2003 (Asilomar 37, 1398), of pairs of samples, Odena et al. 2017
(arXiv 1610.09585); bootstrap, Efron 1979 (Ann. Statist. 7, 1).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ..seeds import check_seed, generator
from .segmenter import LEAST, check_images

NEIGHBOURS = 5  # whose distance is the radius of an image's ball


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


def kid(
    real: Tensor, generated: Tensor, *, subsets: int = 50, subset_size: int = LEAST, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance of two sets of features (N, D) and (M, D): mean and deviation over subsets.

    The unbiased squared MMD with the kernel (x·y/D + 1)³, Bińkowski et al. 2018, by torchmetrics.
    About 0 for two sets of one distribution, whatever their size. Raises ``ValueError`` for
    fewer than ``subset_size`` images, and for features that do not belong together.
    """
    check_features(real, generated)
    if min(len(real), len(generated)) < subset_size:
        raise ValueError(
            f"{len(real)} real and {len(generated)} generated images are too few for KID: give at least "
            f"{subset_size} of each, the subset_size."
        )
    with warnings.catch_warnings():  # it warns of the memory that features take; these are small
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(_Features(real.shape[1]), subsets=subsets, subset_size=subset_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(check_seed(seed))  # torchmetrics draws its subsets from the global state
        metric.update(real, real=True)
        metric.update(generated, real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


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
    cases: tuple[Sequence[int], Sequence[int]] | None = None,
) -> dict[str, float]:
    """Fidelity and diversity apart: precision, recall, density and coverage of features (N, D), (M, D).

    A set's region is the union of a ball around each point, as large as the distance to its k-th neighbour.
    Precision: the share of generated images in the real region; recall: of real images in the generated
    one (Kynkäänniemi et al. 2019). Density: how many real balls a generated image lies in, over k;
    coverage: the share of real balls with a generated image in them (Naeem et al. 2020, which mend
    what a single outlier does to the first two). ``cases``, of the real and of the generated images:
    neighbours are then sought in other cases, for those of a slice are mostly slices of its own head, and
    sets with more slices of a head would get smaller balls. Raises ``ValueError`` for too few images to have
    k neighbours.
    """
    check_features(real, generated)
    if min(len(real), len(generated)) <= k + 1:
        raise ValueError(
            f"{len(real)} real and {len(generated)} generated images are too few for {k} neighbours each."
        )
    real, generated = real.double(), generated.double()  # a count must not hang on the last bit of a sum
    of_real, of_generated = cases or (range(len(real)), range(len(generated)))  # each its own case
    radius_real, radius_generated = _radius(real, k, of_real), _radius(generated, k, of_generated)
    distances = torch.cdist(real, generated)
    in_real = distances <= radius_real[:, None]
    return {
        "precision": float(in_real.any(0).float().mean()),
        "recall": float((distances <= radius_generated[None]).any(1).float().mean()),
        "density": float(in_real.float().sum(0).mean() / k),
        "coverage": float(in_real.any(1).float().mean()),
    }


def _radius(points: Tensor, k: int, cases: Sequence[int]) -> Tensor:
    """Distance (N,) from each point (N, D) to its k-th neighbour in another case."""
    labels = torch.as_tensor(cases)
    radius = torch.cdist(points, points).masked_fill(labels[:, None] == labels, torch.inf).kthvalue(k).values
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
    ``statistic`` gets one tensor of indices a set and returns the figure. A case drawn twice meets itself,
    which makes sets look less alike: the interval of a distance leans upward, the more so for few cases.
    """
    drawn = generator(seed)
    places = [_places(torch.as_tensor(labels)) for labels in cases]
    found = []
    for _ in range(rounds):
        indices = []
        for groups in places:
            picked = torch.randint(0, len(groups), (len(groups),), generator=drawn)
            indices.append(torch.cat([groups[i] for i in picked]))
        found.append(statistic(*indices))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _places(labels: Tensor) -> list[Tensor]:
    """Where each label stands: one tensor of indices a label."""
    return [(labels == label).nonzero()[:, 0] for label in labels.unique()]
