"""All figures of a set of samples, beside those of sets of which the answer is known.

A judge must pass two controls: a perfect generator, which is real slices of further heads handed in as
samples, must come out at a KID of 0 and without copies; a network that learned slices by heart must be
caught.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import OASISDataset, load_slices, to_unit_range
from ..layout import DataLocation
from ..seeds import generator
from .anatomy import anatomy, anatomy_distances
from .copies import EXPECTED, Memorisation, relative_distance
from .distances import (
    HEADS,
    NEIGHBOURS,
    KernelDistance,
    bootstrap,
    fid,
    kid,
    kid_of,
    ms_ssim,
    precision_recall,
)
from .segmenter import LEAST, Segmenter, check_images, embed, segment

BY_HEART = 8  # training slices that the control "by heart" repeats, with noise of this deviation
GRAIN = 0.02
KINDS = ("images", "features")  # what copies are searched by


@dataclass(frozen=True)
class Split:
    """Slices as the segmenter reads them, their features and cases; an index takes rows of all three."""

    images: Tensor
    features: Tensor
    cases: Sequence[int]

    def __getitem__(self, rows: Tensor) -> Split:
        return Split(self.images[rows], self.features[rows], torch.as_tensor(self.cases)[rows].tolist())


@dataclass(frozen=True)
class Real:
    """Three sets of real slices of heads that no network learned from, no head in two of them.

    ``reference``: what everything is compared with; ``unseen``: sets the threshold of the search for copies;
    ``others``: stands for the samples of a perfect generator.
    """

    reference: Split
    unseen: Split
    others: Split


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found: a row of figures for each set of images, and what the report shows.

    ``rows``: "generated" and what it is to be compared with → name of the figure → value, or None where
    there are too few images for it. "KID above perfect" is the row's KID less that of the perfect
    generator; "nearer to training" and "closer than unseen" are ``share`` and ``closer`` of a
    :class:`Memorisation`. ``anatomy``: "real" and "generated" → figures of each slice. ``pairs``: the
    generated images that are nearest to training, and what they are nearest to. ``searched``: how many
    training cases the search for copies has looked through.
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


def load_real(location: DataLocation, segmenter: Segmenter) -> Real:
    """What to judge a network by that learned from ``location``.

    For phantoms fresh heads with one slice each, half of them as reference and a quarter as each of the
    others: made at the first call, which takes minutes. Of other data the split to validate is the
    reference, and each half of the test split's cases one of the others.
    """
    if location.kind == "phantoms":
        from ..intake.phantoms import fresh_heads

        return Real(*_by_case(load_split(fresh_heads().test, segmenter), (0.5, 0.75)))
    reference = load_split(location.validate, segmenter)
    return Real(reference, *_by_case(load_split(location.test, segmenter), (0.5,)))


def _by_case(split: Split, bounds: Sequence[float]) -> list[Split]:
    """The split in parts with cases of their own, cut at these shares of the cases."""
    labels = torch.as_tensor(split.cases)
    cases = labels.unique()
    parts = cases.tensor_split([round(share * len(cases)) for share in bounds])
    return [split[torch.isin(labels, part)] for part in parts]


def evaluate(
    images: Tensor, train: Split, real: Real, segmenter: Segmenter, *, rounds: int = 200
) -> Evaluation:
    """Everything in this module about generated ``images`` (B, 1, H, W), with controls, floor and ceiling.

    Compared with ``real.reference`` are "generated"; as controls a "perfect generator", which is
    ``real.others``, and "by heart", eight slices of ``train`` over and over with a little noise; as the
    worst that can be, the "mean of training" over and over and "noise". FID, precision and recall, density,
    coverage and anatomy take equally many images of every set. Intervals (95 %) by :func:`bootstrap` over
    heads, for differences with the same heads of the reference on both sides. Raises ``ValueError`` as
    :func:`check_images`, for fewer than 100 images, and as :func:`check_real`.
    """
    check_real(real)
    images = resize_for_segmenter(check_sample(images))
    reference = real.reference
    sets = {
        "generated": _alone(images, segmenter),
        "perfect generator": real.others,
    } | {name: _alone(made, segmenter) for name, made in _made(len(images), train.images).items()}
    count = min(len(split.images) for split in (*sets.values(), reference))
    few = reference[_evenly(reference, count)]
    unseen = {kind: _relative(real.unseen, train, reference, kind)[0] for kind in KINDS}
    distances = {
        name: kid_of(reference.features, s.features, cases=(reference.cases, s.cases))
        for name, s in sets.items()
    }
    real_anatomy, rows, found, copies = anatomy(segment(few.images, segmenter)), {}, {}, {}
    for name, split in sets.items():
        row = _kernel_figures(name, distances, sets, reference, rounds)
        picked = split[_evenly(split, count)]
        row["FID"] = fid(few.features, picked.features) if count > split.features.shape[1] else None
        row |= precision_recall(few.features, picked.features, cases=(few.cases, picked.cases))
        row["MS-SSIM of pairs"] = ms_ssim(split.images)
        for kind in KINDS:
            copies[kind] = Memorisation(
                *_relative(split, train, reference, kind), unseen[kind], (split.cases, real.unseen.cases)
            )
            row |= _with_interval(f"nearer to training, {kind}", copies[kind].share, copies[kind].interval())
            closer = copies[kind].closer, copies[kind].closer_interval(rounds)
            row |= _with_interval(f"closer than unseen, {kind}", *closer)
        if name == "generated":
            worst = copies["features"].ratio.argsort()[:8].tolist()
            pairs = [(images[i], train.images[copies["features"].nearest[i]]) for i in worst]
        found[name] = anatomy(segment(picked.images, segmenter))
        off = anatomy_distances(real_anatomy, found[name])
        row |= {f"anatomy: {part}": value for part, value in off.items()}
        # JSON knows neither NaN nor infinity
        rows[name] = {key: v if v is None or math.isfinite(v) else None for key, v in row.items()}
    both = {"real": real_anatomy, "generated": found["generated"]}
    return Evaluation(rows, both, pairs, len(set(train.cases)))


def notes(
    evaluation: Evaluation, card: dict[str, Any], data: DataLocation, segmenter_card: dict[str, Any]
) -> list[str]:
    """What a reader of the report must know: the search for copies, the fit of the judge, failed controls.

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
    return found + _failed_controls(evaluation.rows)


def _failed_controls(rows: dict[str, dict[str, float | None]]) -> list[str]:
    """What the two controls say against the judge, in words."""

    def outside(row: str, figure: str, value: float) -> str:
        """The figure with its interval if that lies on one side of ``value``."""
        found, low, high = (rows.get(row, {}).get(figure + end) for end in ("", ", low", ", high"))
        known = None not in (found, low, high)
        return f"{found:.3g} (95 %: {low:.3g} to {high:.3g})" if known and not low <= value <= high else ""

    perfect, by_heart, said = "perfect generator", "by heart", []
    if kid_ := outside(perfect, "KID", 0):
        said.append(
            f"a control failed: real slices handed in as samples, a perfect generator, have a KID of {kid_} "
            "and should have 0: the reference and the other heads differ, so read KID above perfect"
        )
    for kind in KINDS:
        figure = f"nearer to training, {kind}"
        if share := outside(perfect, figure, EXPECTED):
            said.append(
                f"a control failed: by {kind}, the share of a perfect generator's slices nearer to training "
                f"is {share} and should be {EXPECTED}: the search for copies finds some where there are none"
            )
        low = rows.get(by_heart, {}).get(f"{figure}, low")
        if low is not None and low <= EXPECTED:
            said.append(
                f"a control failed: by {kind}, a network that learned {BY_HEART} training slices by heart "
                "is not caught: the search for copies would miss those of the samples, too"
            )
    return said


def check_real(real: Real) -> None:
    """``ValueError`` unless there are slices enough to compare with: known before anything is drawn."""
    for name, split in vars(real).items():
        slices, cases = len(split.cases), Counter(split.cases)
        if slices < LEAST or len(cases) < HEADS or slices - max(cases.values()) < NEIGHBOURS:
            raise ValueError(
                f"{_PLACES[name]} has {slices} slices of {len(cases)} cases: a report needs {LEAST} of "
                f"{HEADS} cases, and for each of them {NEIGHBOURS} of other cases. Give a larger data set."
            )


_PLACES = {
    "reference": "the reference, which is the validate split,",
    "unseen": "the set of unseen heads, half of the test split,",
    "others": "the set of other heads, half of the test split,",
}


def check_sample(images: Tensor) -> Tensor:
    """Enough generated images of any size, or ``ValueError``."""
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"images have shape {tuple(images.shape)}: give (B, 1, H, W).")
    check_images(resize_for_segmenter(images) if images.isfinite().all() else images, least=LEAST)
    return images


def _alone(images: Tensor, segmenter: Segmenter) -> Split:
    """Generated images, of which each is a head of its own."""
    return Split(images, embed(images, segmenter), range(len(images)))


def _made(count: int, train: Tensor) -> dict[str, Tensor]:
    """The sets whose answer is known and that are made here, of ``count`` images each."""
    drawn = generator(0)
    noise = torch.randn((count, *train.shape[1:]), generator=drawn)
    grain = GRAIN * torch.randn(noise.shape, generator=drawn)
    known = train[torch.linspace(0, len(train) - 1, BY_HEART).long()]
    return {
        "by heart": (known[torch.arange(count) % BY_HEART] + grain).clamp(-1, 1),
        "mean of training": train.mean(0, keepdim=True).expand_as(noise),
        "noise": noise.clamp(-1, 1),
    }


def _evenly(split: Split, count: int) -> Tensor:
    """The indices of ``count`` images, evenly spaced."""
    return torch.linspace(0, len(split.images) - 1, count).long()


def _relative(split: Split, train: Split, reference: Split, kind: str) -> tuple[Tensor, Tensor]:
    return relative_distance(*(getattr(s, kind).flatten(1) for s in (split, train, reference)))


def _with_interval(
    name: str, value: float | None, interval: tuple[float | None, float | None]
) -> dict[str, float | None]:
    return {name: value, f"{name}, low": interval[0], f"{name}, high": interval[1]}


def _kernel_figures(
    name: str, distances: dict[str, KernelDistance], sets: dict[str, Split], reference: Split, rounds: int
) -> dict[str, float | None]:
    """KID of one set, and how much it is above that of the perfect generator."""
    own, perfect = distances[name], distances["perfect generator"]
    split, others = sets[name], sets["perfect generator"]

    def value(of: Split) -> float:
        return kid(reference.features, of.features, cases=(reference.cases, of.cases))[0]

    row = _with_interval("KID", value(split), bootstrap(own, reference.cases, split.cases, rounds=rounds))
    if split is others:
        return row | _with_interval("KID above perfect", None, (None, None))
    interval = bootstrap(
        lambda real, i, j: own(real, i) - perfect(real, j),
        *(reference.cases, split.cases, others.cases),
        rounds=rounds,
    )
    return row | _with_interval("KID above perfect", value(split) - value(others), interval)
