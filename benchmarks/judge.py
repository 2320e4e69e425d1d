"""One protocol for all benchmarks that judge images, and the statistics of what they compare.

320 samples of 20 DPM-Solver++ steps (timesteps "trailing", estimates clipped, fp32, batches of 64 with one
seed each) are compared with heads that no network has seen: of phantoms 600, one slice each. KID, the
jackknife and the bootstrap are those of the package; a difference of two sets of images is bootstrapped as a
difference, with the same heads and the same images drawn for both.

Sources: the correction for several comparisons, Holm 1979 (Scand. J. Statist. 6, 65).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from runs import hardware
from scipy import stats
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from oasis_helpers.data import DataLocation, find_data, read_slices, to_unit_range
from oasis_helpers.evaluation import (
    PIXEL,
    Real,
    Segmenter,
    Split,
    anatomy,
    anatomy_distances,
    bootstrap,
    embed,
    fid,
    kid,
    kid_of,
    load_real,
    load_segmenter,
    precision_recall,
    resize_for_segmenter,
    segment,
)
from oasis_helpers.phantoms import fresh_heads, make_phantoms, phantom_cache
from oasis_helpers.sampling import clipped, sample_images

SAMPLES, BATCH = 320, 64
METHOD, STEPS, SPACING = "dpm_solver", 20, "trailing"
SETTING = f"{SAMPLES} samples of {STEPS} DPM-Solver++ steps, clipped, fp32"
MOST_BATCHES = 1000  # of one draw, so that two draws share no seed


def machine() -> str:
    """What it was measured on, for the JSON."""
    return f"{hardware()}, {platform.machine()}, torch {torch.__version__}"


def described(location: DataLocation) -> str:
    """A line on the phantoms that a network learned from, for its card: what their folder says of itself."""
    plan = json.loads((location.root / "phantoms.json").read_text(encoding="utf-8"))
    return f"phantoms: {plan['cases'][0]} cases, recipe {plan['recipe']}, seed {plan['seed']}"


# ---- drawing and judging ------------------------------------------------------------------------


def draw(
    denoise,
    count: int = SAMPLES,
    seed: int = 0,
    method: str = METHOD,
    steps: int | None = STEPS,
    spacing: str = SPACING,
    y: dict[str, Tensor] | None = None,
) -> Tensor:
    """``count`` samples of a denoiser, (count, C, H, W) in [−1, 1]; two ways from one seed start alike.

    ``y``: what each is asked for, by name.
    """
    how, parts = {"method": method, "steps": steps, "spacing": spacing}, []
    for number, first in enumerate(range(0, count, BATCH)):
        asked = {name: values[first : first + BATCH] for name, values in (y or {}).items()}
        size, from_seed = min(BATCH, count - first), MOST_BATCHES * seed + number
        parts.append(sample_images(clipped(denoise), size, seed=from_seed, y=asked or None, **how))
    return torch.cat(parts).float().clamp(-1, 1).cpu()


class Judge:
    """Compares images (B, 1, H, W) in [−1, 1] with the reference of ``real``."""

    def __init__(self, segmenter: Segmenter, real: Real):
        self.segmenter, self.real = segmenter, real
        self._anatomy = anatomy(segment(real.reference.images, segmenter))

    @property
    def mean_symmetry(self) -> float:
        """The share of brain whose mirror image has the same tissue, in the mean over the real heads."""
        return float(self._anatomy["symmetry"].nanmean())

    def split(self, images: Tensor, cases: Sequence[int] | None = None) -> Split:
        """The images as the segmenter reads them; without ``cases`` each is a head of its own."""
        images = resize_for_segmenter(images)
        heads = range(len(images)) if cases is None else cases
        return Split(images, embed(images, self.segmenter), list(heads))

    def distance(self, images: Tensor, cases: Sequence[int] | None = None) -> dict[str, float]:
        """KID to the reference with its jackknife error and its interval (95 %, by head)."""
        reference, split = self.real.reference, self.split(images, cases)
        heads = reference.cases, split.cases
        value, error = kid(reference.features, split.features, cases=heads)
        low, high = bootstrap(kid_of(reference.features, split.features, cases=heads), *heads)
        return {"KID": value, "KID, jackknife error": error, "KID, low": low, "KID, high": high}

    def figures(self, images: Tensor, cases: Sequence[int] | None = None) -> dict[str, float | None]:
        """:meth:`distance`, and FID, precision, recall, density, coverage and anatomy.

        All but KID and the mean symmetry are of as many images on both sides as the perfect generator has, so
        that all rows count alike, as in ``evaluate``. FID is None for fewer images than features.
        """
        reference, split = self.real.reference, self.split(images, cases)
        count = min(len(s.cases) for s in (reference, split, self.real.others))
        some, few = (torch.linspace(0, len(s.cases) - 1, count).long() for s in (reference, split))
        a, b, seen = reference[some], split[few], anatomy(segment(split.images, self.segmenter))
        found = self.distance(images, cases)
        found["FID"] = fid(a.features, b.features) if count > a.features.shape[1] else None
        found |= precision_recall(a.features, b.features, cases=(a.cases, b.cases))
        parts = ({name: v[rows] for name, v in f.items()} for f, rows in ((self._anatomy, some), (seen, few)))
        found |= {f"anatomy: {name}": value for name, value in anatomy_distances(*parts).items()}
        return found | {"mean symmetry": float(seen["symmetry"].nanmean())}

    def perfect(self) -> dict[str, float | None]:
        """:meth:`figures` of real heads that are in no other set: what a perfect generator would reach."""
        return self.figures(self.real.others.images, self.real.others.cases)

    def difference(
        self, images_a: Tensor, images_b: Tensor, cases: Sequence[int] | None = None
    ) -> dict[str, float]:
        """KID of a less KID of b with its interval (95 %), paired over the reference's heads and the images.

        Image j of both belongs together: drawn from one noise, or two forms of one head. Raises
        ``ValueError`` for unequal numbers.
        """
        if len(images_a) != len(images_b):
            raise ValueError(f"{len(images_a)} and {len(images_b)} images: give pairs.")
        reference = self.real.reference
        a, b = (self.split(images, cases) for images in (images_a, images_b))
        kid_a, kid_b = (
            kid_of(reference.features, s.features, cases=(reference.cases, s.cases)) for s in (a, b)
        )

        def between(i: Tensor, j: Tensor) -> float:
            return kid_a(i, j) - kid_b(i, j)

        low, high = bootstrap(between, reference.cases, a.cases)
        value = between(torch.arange(len(reference.cases)), torch.arange(len(a.cases)))
        return {"difference": value, "low": low, "high": high}


def fresh(cases: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """Images in [−1, 1] (N, 1, size, size) and class ids (N, size, size) of these fresh heads, in order."""
    found = read_slices(fresh_heads().test, size, masks=True)
    place = {case: row for row, case in enumerate(found.case.tolist())}
    rows = [place[case] for case in cases]
    return to_unit_range(found.images[rows]), found.masks[rows]


@cache
def judge_of(root: str | None = None, size: int = Segmenter.image_size) -> Judge:
    """The judge for a data set, by default the phantoms, once a process.

    With another ``size`` the real heads are read at that size and enlarged, as the images will be: for
    phantoms only.
    """
    segmenter = load_segmenter()
    # by default not find_data(): these figures are about phantoms
    real = load_real(find_data(root) if root else make_phantoms(phantom_cache()), segmenter)
    if size == Segmenter.image_size:
        return Judge(segmenter, real)
    seen = {}
    for name in ("reference", "unseen", "others"):
        cases = getattr(real, name).cases
        images = resize_for_segmenter(fresh(cases, size)[0])
        seen[name] = Split(images, embed(images, segmenter), cases)
    return Judge(segmenter, Real(**seen))


# ---- statistics over seeds ----------------------------------------------------------------------


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Mean of several runs, and where the mean of all possible runs lies (95 %, Student's t)."""
    mean, error = float(np.mean(values)), float(stats.sem(values))
    low, high = stats.t.interval(0.95, len(values) - 1, mean, error)
    return {"mean": mean, "low": float(low), "high": float(high)}


def paired(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """What :func:`over_seeds` says of the differences of two settings seed by seed, and p that there is none.

    The same seed draws the same slices, timesteps and noise for batches of one size.
    """
    differences = np.subtract(values, base)
    return over_seeds(differences) | {"p": float(stats.ttest_1samp(differences, 0.0).pvalue)}


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of several comparisons, each corrected for all of them: Holm 1979."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.maximum.accumulate(factors * np.asarray(p_values, float)[order]).clip(max=1)
    return corrected[np.argsort(order)].tolist()


# ---- spoilt images: does the distance see it? ---------------------------------------------------


def blurred(images: Tensor, pixels: float) -> Tensor:
    """Images (B, 1, H, W) under a Gaussian of standard deviation ``pixels``."""
    return gaussian_blur(images, 2 * round(4 * pixels) + 1, pixels)


def grainy(images: Tensor, levels: float, seed: int = 0) -> Tensor:
    """Images in [−1, 1] with normal noise of ``levels`` of 255 grey levels, held in the range."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + levels / 127.5 * noise).clamp(-1, 1)


def darker(images: Tensor, share: float) -> Tensor:
    """Images in [−1, 1] with ``share`` of their brightness taken away; air at −1 stays."""
    return (images + 1) * (1 - share) - 1


def without_scalp(images: Tensor, masks: Tensor, beyond: float = 5.0) -> Tensor:
    """Images with nothing bright farther than ``beyond`` mm outside the brain: it gets the grey of the air.

    ``masks``: class ids (B, H, W), 64×64 pixels.
    """
    away = np.stack([distance_transform_edt(mask) for mask in (masks == 0).cpu().numpy()])
    far = torch.from_numpy(away * PIXEL > beyond)[:, None].to(images.device)
    air = torch.stack([image[where].quantile(0.1) for image, where in zip(images, far)])[:, None, None, None]
    return torch.where(far, images.minimum(air), images)


def swapped_halves(images: Tensor) -> Tensor:
    """The first and the second of every two heads with their right halves exchanged; an even number of them.

    As stored, rows run from left to right.
    """
    middle = images.shape[-2] // 2
    partner = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return torch.cat([images[..., :middle, :], partner[..., middle:, :]], -2)


def mirrored(images: Tensor) -> Tensor:
    """Images with left and right exchanged."""
    return images.flip(-2)


def shrunk(images: Tensor, size: int) -> Tensor:
    """Images (B, 1, H, W) at ``size`` pixels, which is not above theirs."""
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
