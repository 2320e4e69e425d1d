"""All figures of a set of samples beside a floor and a ceiling."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import OASISDataset, load_slices, to_unit_range
from ..layout import DataLocation
from .anatomy import anatomy, anatomy_distances
from .copies import memorisation
from .distances import NEIGHBOURS, bootstrap, fid, kid, ms_ssim, precision_recall
from .segmenter import LEAST, Segmenter, check_images, embed, segment


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
    ``pairs``: the generated images that are nearest to training, and what they are nearest to. ``searched``:
    how many training cases the search for copies has looked through.
    """

    rows: dict[str, dict[str, float | None]]
    anatomy: dict[str, dict[str, Tensor]]
    pairs: list[tuple[Tensor, Tensor]]
    searched: int


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
    (95 %) by :func:`bootstrap`. Raises ``ValueError`` as :func:`check_images`, for fewer than 100 images, and
    as :func:`check_splits`.
    """
    check_splits(validate, test)
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
    both = {"real": real_anatomy, "generated": found["generated"]}
    return Evaluation(rows, both, pairs, len(set(train.cases)))


def notes(
    evaluation: Evaluation, card: dict[str, Any], data: DataLocation, segmenter_card: dict[str, Any]
) -> list[str]:
    """What a reader of the report must know: how far the search for copies went, and whether the judge fits.

    ``card`` is that of the weights, ``segmenter_card`` that of the segmenter.
    """
    learned_from = str(card.get("data", ""))
    seen = re.search(r"(\d[\d,]*) cases", learned_from)
    of = f" of the {seen[1]} that the weights saw" if seen else "; the weights do not say how many they saw"
    if seen and not learned_from.startswith(data.kind):
        of = f", and the weights saw none of them: they learned from {learned_from}"
    found = [f"copies were searched for among {evaluation.searched} training cases{of}"]
    if data.kind != "phantoms" and "phantoms" in str(segmenter_card.get("data", "")):
        found.append(
            "the segmenter learned from phantoms and judges other data: its figures say little; train one on "
            "these slices and give it as --segmenter"
        )
    return found


def check_splits(validate: Split, test: Split) -> None:
    """``ValueError`` unless there are slices enough to compare with: known before anything is drawn."""
    for name, split in (("validate", validate), ("test", test)):
        slices, cases = len(split.cases), Counter(split.cases)
        if slices < LEAST or slices - max(cases.values()) < NEIGHBOURS:
            raise ValueError(
                f"the {name} split has {slices} slices of {len(cases)} cases: a report needs {LEAST}, and "
                f"for each of them {NEIGHBOURS} of other cases. Give a larger data set."
            )


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
        # Cases have unlike many slices, so drawing cases again may give fewer slices than there are.
        least = min(LEAST, len(real), len(generated))
        return kid(validate.features[real], split.features[generated], subset_size=least)[0]

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
