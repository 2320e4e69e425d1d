"""Are samples copies of training slices?

Carlini et al. 2023 (arXiv 2301.13188) and Meehan et al. 2020 (arXiv 2004.05675); the question for diffusion
models, Somepalli et al. 2023 (arXiv 2212.03860). Interval of a share, Wilson 1927 (J. Am. Stat. Assoc. 22,
209); two samples by rank, Mann & Whitney 1947 (Ann. Math. Statist. 18, 50).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from .distances import Cases, bootstrap, check_features

EXPECTED = 0.01  # share of images of persons never seen that fall below the threshold, too


@dataclass(frozen=True)
class Memorisation:
    """What :func:`memorisation` found for every generated image (M,).

    ``ratio``: distance to the nearest training image over that to the nearest of the reference;
    ``nearest``: index of the former; ``unseen``: the same ratio of real images of persons never seen (N,), of
    whom ``expected`` are below the threshold; ``cases``: the heads of the generated and of the unseen images.
    """

    ratio: Tensor
    nearest: Tensor
    unseen: Tensor
    cases: Cases
    expected: float = EXPECTED

    @property
    def threshold(self) -> float:
        """The ratio that a further unseen image is below with probability ``expected``."""
        # Of n values and one more, the r-th smallest is above the further one in r of n + 1 orders.
        return float(np.quantile(self.unseen.numpy(), self.expected, method="weibull"))

    @property
    def flagged(self) -> Tensor:
        return self.ratio < self.threshold

    @property
    def share(self) -> float:
        """Share of generated images that are nearer to training than the threshold."""
        return float(self.flagged.double().mean())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson's interval for :attr:`share`, which without copies holds ``expected``.

        The threshold was itself found from a sample, so the share varies as one counted in 1 / (1/M + 1/N)
        images; of several slices of a head only one is counted. Too narrow where few heads have slices that
        are all alike.
        """
        n = 1 / sum(1 / len(set(heads)) for heads in map(_listed, self.cases))
        z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
        centre = self.share + z2 / (2 * n)
        half = math.sqrt(z2 * (self.share * (1 - self.share) / n + z2 / (4 * n**2)))
        return max((centre - half) / (1 + z2 / n), 0.0), min((centre + half) / (1 + z2 / n), 1.0)

    @property
    def closer(self) -> float:
        """The probability that a generated image is relatively nearer to training than an unseen real one.

        0.5 without copies, 1 if all are: the statistic of Mann & Whitney 1947 over M·N. All images count in
        it, and in :attr:`share` only those below the threshold.
        """
        return float(self._wins().mean())

    def closer_interval(self, rounds: int = 200) -> tuple[float, float]:
        """The interval (95 %) of :attr:`closer`, by :func:`bootstrap` over heads."""
        wins = self._wins()
        return bootstrap(lambda i, j: float(wins[i][:, j].mean()), *map(_listed, self.cases), rounds=rounds)

    def _wins(self) -> Tensor:
        """(M, N): 1 where a generated image has a smaller ratio than an unseen one, ½ where they tie."""
        return ((self.unseen - self.ratio[:, None]).sign() + 1) / 2


def _listed(cases: Sequence[int]) -> list[int]:
    return torch.as_tensor(cases).tolist()


def memorisation(
    generated: Tensor,
    train: Tensor,
    reference: Tensor,
    unseen: Tensor,
    *,
    cases: Cases | None = None,
    expected: float = EXPECTED,
) -> Memorisation:
    """Are generated images copies of training images? Vectors (M, D): pixels or features.

    Every training set has a nearest image; the question is whether it is nearer than it would be by chance.
    ``reference`` and ``unseen`` are two sets of real images of other persons: the ratio of distances to the
    nearest in ``train`` and in ``reference`` is taken for ``unseen`` first, and the threshold set where
    only the share ``expected`` of them falls below. A perfect generator gives images as ``unseen`` are, so
    that as few of its images do. ``cases``: the heads of the generated and of the unseen images, without
    which each is its own. After the tests of Carlini et al. 2023 and Meehan et al. 2020. Raises
    ``ValueError`` for sets too small for the threshold.
    """
    check_features(generated, train, reference, unseen)
    if len(unseen) * expected < 1:
        raise ValueError(
            f"{len(unseen)} unseen images cannot set a threshold that {expected:.2%} of them fall below: "
            f"give at least {math.ceil(1 / expected)}."
        )
    found = relative_distance(generated, train, reference)
    cases = cases or (range(len(generated)), range(len(unseen)))
    return Memorisation(*found, relative_distance(unseen, train, reference)[0], cases, expected)


def relative_distance(images: Tensor, train: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest of ``train`` over that to the nearest of ``reference``, and the former's index.

    Vectors (M, D), (N, D), (K, D) → (M,) each.
    """
    to_train, nearest = nearest_images(images, train)
    return to_train / nearest_images(images, reference)[0].clamp(min=1e-12), nearest


def nearest_images(images: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to, and index of, the nearest of ``among`` (N, D) for each of ``images`` (M, D)."""
    among = among.double()  # which is nearest must not hang on the last bit of a sum
    found = [torch.cdist(part.double(), among).min(1) for part in images.flatten(1).split(256)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
