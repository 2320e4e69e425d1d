"""Judging samples: a segmentation network made for these slices, and distances in its features.

The feature network of the usual FID was trained on photographs. This one was trained to find CSF, grey
and white matter, so what it keeps of an image is anatomy.

Sources: KID, Bińkowski et al. 2018 (arXiv 1801.01401); FID, Heusel et al. 2017 (arXiv 1706.08500);
precision and recall, Kynkäänniemi et al. 2019 (arXiv 1904.06991); density and coverage, Naeem et al. 2020
(arXiv 2002.09797); MS-SSIM, Wang et al. 2003 (Asilomar 37, 1398), of pairs of samples, Odena et al. 2017
(arXiv 1610.09585); bootstrap, Efron 1979 (Ann. Statist. 7, 1); copies, Somepalli et al. 2023 (arXiv
2212.03860) and Carlini et al. 2023 (arXiv 2301.13188); Dice, 1945 (Ecology 26, 297); U-Net for
segmentation, Ronneberger et al. 2015 (arXiv 1505.04597).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.ndimage import distance_transform_edt
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from .data import OASISDataset, load_slices, to_unit_range
from .training import read_tensors, replace_file
from .unet import UNet

LEAST = 100  # generated images: what a subset of KID takes
SEGMENTER = Path(__file__).parent / "weights" / "segmenter-64.safetensors"


class Segmenter(nn.Module):
    """The U-Net of the series with four answers a pixel instead of a guess of the noise.

    ``forward(x)``: (B, 1, 64, 64) in [−1, 1] → scores (B, 4, 64, 64) of background, CSF, grey, white.
    """

    image_size = 64
    settings = MappingProxyType(
        {"base_channels": 32, "channel_mult": (1, 2, 4), "attention_levels": (), "patch_size": 2}
    )

    def __init__(self):
        super().__init__()
        self.unet = UNet(in_channels=1, out_channels=4, **self.settings)
        self.num_features = 2 * 32 * 4
        # Mean and deviation over the images it was trained on: every feature then counts alike.
        self.register_buffer("feature_mean", torch.zeros(self.num_features))
        self.register_buffer("feature_std", torch.ones(self.num_features))

    def _time(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=torch.long, device=x.device)  # every image is clean

    def forward(self, x: Tensor) -> Tensor:
        return self.unet(x, self._time(x))

    def features(self, x: Tensor) -> Tensor:
        """Mean and deviation of each channel of the bottleneck, standardised, (B, num_features)."""
        h = self.unet.encode(x, self._time(x))[0].flatten(2)
        return (torch.cat([h.mean(2), h.std(2)], 1) - self.feature_mean) / self.feature_std

    @torch.no_grad()
    def standardise(self, x: Tensor) -> None:
        """Let the features of the images ``x`` have mean 0 and deviation 1 from now on."""
        self.feature_mean.zero_(), self.feature_std.fill_(1)
        found = torch.cat([self.features(part) for part in x.split(64)])
        self.feature_mean.copy_(found.mean(0)), self.feature_std.copy_(found.std(0))


def check_images(images: Tensor, least: int = 1) -> Tensor:
    """``images`` if they are what the segmenter reads, else ``ValueError`` that names the fault.

    Wanted: float (B, 1, 64, 64) with at least ``least`` of them, numbers only, values in about [−1, 1],
    none constant.
    """
    size = Segmenter.image_size
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1:] != (1, size, size):
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}: the segmenter reads float "
            f"(B, 1, {size}, {size}) in [−1, 1]. Resize them, or use to_unit_range for bytes."
        )
    if len(images) < least:
        raise ValueError(f"{len(images)} images are too few: this figure needs at least {least}.")
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinity: the run that made them has failed.")
    low, high = float(images.min()), float(images.max())
    if low < -1.5 or high > 1.5 or low >= -0.05:
        raise ValueError(
            f"images run from {low:.3g} to {high:.3g}: the segmenter reads [−1, 1] with dark air at −1."
        )
    if constant := int((images.flatten(1).std(1) < 1e-3).sum()):
        raise ValueError(f"{constant} of {len(images)} images are constant: there is nothing to judge.")
    return images


@torch.no_grad()
def embed(images: Tensor, segmenter: Segmenter) -> Tensor:
    """Features of every image, (B, 1, 64, 64) → (B, num_features), on the CPU."""
    device = next(segmenter.parameters()).device
    return torch.cat([segmenter.features(part.to(device)).cpu() for part in check_images(images).split(64)])


@torch.no_grad()
def segment(images: Tensor, segmenter: Segmenter) -> Tensor:
    """Class of every pixel, (B, 1, 64, 64) → long (B, 64, 64): background, CSF, grey, white."""
    device = next(segmenter.parameters()).device
    return torch.cat([segmenter(part.to(device)).argmax(1).cpu() for part in check_images(images).split(64)])


def dice(predicted: Tensor, masks: Tensor) -> Tensor:
    """2·|A∩B| / (|A| + |B|) of each of the four classes over all images, (4,): Dice 1945.

    ``predicted`` and ``masks``: class ids (B, H, W). A class in neither is NaN.
    """
    a, b = (F.one_hot(ids.long(), 4).flatten(0, 2).bool() for ids in (predicted, masks))
    return 2 * (a & b).sum(0) / (a.sum(0) + b.sum(0))


def train_segmenter(
    slices: Tensor, masks: Tensor, *, steps: int = 2000, batch_size: int = 16, lr: float = 3e-3, seed: int = 0
) -> Iterator[tuple[int, float, Segmenter]]:
    """Train a :class:`Segmenter` and yield (step, loss, network) after every step.

    ``slices``: uint8 (N, 1, 64, 64); ``masks``: class ids (N, 64, 64). Cross-entropy; brightness,
    contrast, left and right, and a little noise vary, so that it can judge images that are not perfect.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Segmenter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(1, steps + 1):
        picked = torch.randint(0, len(slices), (batch_size,), generator=generator)
        x, wanted = to_unit_range(slices[picked]), masks[picked].long()
        if torch.rand((), generator=generator) < 0.5:  # as stored, left and right are rows
            x, wanted = x.flip(-2), wanted.flip(-2)
        gain, shift, noise = torch.rand((3, batch_size, 1, 1, 1), generator=generator)
        x = (x + 1) * (0.8 + 0.4 * gain) - 1 + 0.1 * (shift - 0.5)
        x = x + 0.05 * noise * torch.randn(x.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(x)
        loss = F.cross_entropy(scores.float(), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == steps:
            model.eval().standardise(to_unit_range(slices[:: max(len(slices) // 2000, 1)]))
        yield step, loss.item(), model


def save_segmenter(path: str | Path, model: Segmenter, **card: str) -> None:
    """Write a segmenter to a safetensors file, atomically; ``card`` goes into its metadata."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    replace_file(Path(path), lambda temporary: save_file(tensors, temporary, {"kind": "segmenter", **card}))


def load_segmenter(path: str | Path = SEGMENTER, device: torch.device | str = "cpu") -> Segmenter:
    """The segmenter that ships, or another of :func:`save_segmenter`; ``ValueError`` for other files."""
    tensors, metadata = read_tensors(path)
    if metadata.get("kind") != "segmenter":
        raise ValueError(f"{path} holds no segmenter.")
    model = Segmenter()
    model.load_state_dict(tensors)
    return model.to(device).eval()


class _Features(nn.Module):
    """What torchmetrics asks of a feature network; here the features are computed already."""

    def __init__(self, size: int):
        super().__init__()
        self.num_features = size

    def forward(self, x: Tensor) -> Tensor:
        return x


def _check_features(*sets: Tensor) -> None:
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
    _check_features(real, generated)
    with warnings.catch_warnings():  # it warns of the memory that features take; these are small
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(_Features(real.shape[1]), subsets=subsets, subset_size=subset_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # torchmetrics draws its subsets from the global state
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
    _check_features(real, generated)
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
    real: Tensor, generated: Tensor, k: int = 5, *, cases: tuple[Sequence[int], Sequence[int]] | None = None
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
    _check_features(real, generated)
    if min(len(real), len(generated)) <= k + 1:
        raise ValueError(
            f"{len(real)} real and {len(generated)} generated images are too few for {k} neighbours each."
        )
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
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, len(images), (pairs,), generator=generator)
    second = (first + torch.randint(1, len(images), (pairs,), generator=generator)) % len(images)
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
    generator = torch.Generator().manual_seed(seed)
    places = [_places(torch.as_tensor(labels)) for labels in cases]
    found = []
    for _ in range(rounds):
        drawn = []
        for groups in places:
            picked = torch.randint(0, len(groups), (len(groups),), generator=generator)
            drawn.append(torch.cat([groups[i] for i in picked]))
        found.append(statistic(*drawn))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _places(labels: Tensor) -> list[Tensor]:
    """Where each label stands: one tensor of indices a label."""
    return [(labels == label).nonzero()[:, 0] for label in labels.unique()]


# ---- anatomy --------------------------------------------------------------------------------

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


def anatomy_distances(real: dict[str, Tensor], generated: dict[str, Tensor]) -> dict[str, float]:
    """Wasserstein distance between the distributions of each figure of :func:`anatomy`.

    In deviations of the real ones, so that 0.1 means: on average moved by a tenth of how much heads differ.
    """
    found = {}
    for name, values in real.items():
        a, b = (v[~v.isnan()].numpy() for v in (values, generated[name]))
        found[name] = float(wasserstein_distance(a, b) / a.std()) if len(b) else float("inf")
    return found


# ---- copies ---------------------------------------------------------------------------------


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
    where only the share ``expected`` of them falls below. After the distance-ratio test of Somepalli et al.
    2023 and Carlini et al. 2023. Raises ``ValueError`` for sets too small for the threshold.
    """
    _check_features(generated, train, held_out, unseen)
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
    found = [torch.cdist(part, among).min(1) for part in images.flatten(1).split(256)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


# ---- all of it ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The slices of one split as the segmenter reads them, their features, and the case of each."""

    images: Tensor
    features: Tensor
    cases: list[int]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found: a row of figures for each set of images, and what the report shows.

    ``rows``: "generated" and what it is to be compared with → name of the figure → value, or None where
    there are too few images for it. ``anatomy``: "real" and "generated" → figures of each slice.
    ``pairs``: the generated images that are nearest to training, and what they are nearest to.
    """

    rows: dict[str, dict[str, float | None]]
    anatomy: dict[str, dict[str, Tensor]]
    pairs: list[tuple[Tensor, Tensor]]


def resize_for_segmenter(images: Tensor) -> Tensor:
    """(B, 1, H, W) in about [−1, 1] → (B, 1, 64, 64) in [−1, 1], what the segmenter reads."""
    size = (Segmenter.image_size, Segmenter.image_size)
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    return images.clamp(-1, 1)


def load_split(folder: str | Path, segmenter: Segmenter) -> Split:
    """Slices, features and cases of a split folder."""
    images = to_unit_range(load_slices(folder, Segmenter.image_size))
    return Split(images, embed(images, segmenter), OASISDataset(folder).case_ids)


def evaluate(
    images: Tensor, train: Split, validate: Split, test: Split, segmenter: Segmenter, *, rounds: int = 200
) -> Evaluation:
    """Everything in this module about generated ``images`` (B, 1, H, W), with floor and ceiling.

    The generated images are compared with the slices of ``validate``; so are, as the best that can be
    reached, those of ``test``, and as the worst, noise and the mean of ``train`` over and over. Intervals
    (95 %) by :func:`bootstrap`. Raises ``ValueError`` as :func:`check_images`, for fewer than 100 images.
    """
    images = resize_for_segmenter(check_sample(images))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    mean = train.images.mean(0, keepdim=True).expand_as(images)
    alone = list(range(len(images)))  # every generated image is a case of its own
    sets = {
        "generated": Split(images, embed(images, segmenter), alone),
        "held-out slices": test,
        "mean of training": Split(mean, embed(mean, segmenter), alone),
        "noise": Split(noise, embed(noise, segmenter), alone),
    }
    count = min(len(split.images) for split in (*sets.values(), validate))  # FIDs of unlike counts differ
    real_anatomy = anatomy(segment(validate.images, segmenter))
    rows, found = {}, {}
    for name, split in sets.items():
        found[name] = anatomy(segment(split.images, segmenter))
        rows[name] = _row(split, train, validate, test, rounds, count)
        distances = anatomy_distances(real_anatomy, found[name])
        rows[name] |= {f"anatomy: {part}": value for part, value in distances.items()}
    copies = memorisation(*(s.features for s in (sets["generated"], train, validate, test)))
    worst = copies.ratio.argsort()[:8].tolist()
    pairs = [(images[i], train.images[copies.nearest[i]]) for i in worst]
    return Evaluation(rows, {"real": real_anatomy, "generated": found["generated"]}, pairs)


def check_sample(images: Tensor) -> Tensor:
    """Enough generated images of any size, or ``ValueError``."""
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"images have shape {tuple(images.shape)}: give (B, 1, H, W).")
    check_images(resize_for_segmenter(images) if images.isfinite().all() else images, least=LEAST)
    return images


def _row(
    split: Split, train: Split, validate: Split, test: Split, rounds: int, count: int
) -> dict[str, float | None]:
    """The figures of one set of images; FID by ``count`` of them, evenly spaced, and as many real ones."""

    def distance(real: Tensor, generated: Tensor) -> float:
        return kid(validate.features[real], split.features[generated])[0]

    low, high = bootstrap(distance, validate.cases, split.cases, rounds=rounds)
    row = {"KID": kid(validate.features, split.features)[0], "KID, low": low, "KID, high": high}
    few = (x[torch.linspace(0, len(x) - 1, count).long()] for x in (validate.features, split.features))
    row["FID"] = fid(*few) if count > split.features.shape[1] else None
    row |= precision_recall(validate.features, split.features, cases=(validate.cases, split.cases))
    row["MS-SSIM of pairs"] = ms_ssim(split.images)
    for name in ("images", "features"):
        sets = (getattr(s, name).flatten(1) for s in (split, train, validate, test))
        row[f"nearer to training, {name}"] = memorisation(*sets).share
    return row
