"""Exercises of notebook 6: nearer than chance, an interval, the bias of FID, and what a judge misses."""

from __future__ import annotations

from functools import cache

import torch
from torchvision.transforms.functional import gaussian_blur

from .. import evaluation, plots
from ..data import OASISDataset, find_data, load_slices, to_unit_range
from . import Exercise, Wrong, compare

# ---- 6.1 ----------------------------------------------------------------------------------------


def relative(to_train, to_reference):
    """Distances to N training slices (M, N) and K reference slices (M, K) → a ratio for each sample (M,)."""
    return to_train.min(1).values / to_reference.min(1).values


def _diagnose_relative(relative):
    generator = torch.Generator().manual_seed(61)
    to_train, to_reference = (5 + torch.rand((4, n), generator=generator).double() * 3 for n in (7, 5))
    to_train[2, 3] = 0.2  # the third is a copy
    nearest, other = to_train.min(1).values, to_reference.min(1).values
    compare(
        relative(to_train, to_reference),
        nearest / other,
        "the ratio of each of 4 samples",
        {
            "upside down: a copy, whose distance to training is 0.2, should get a ratio near 0.": (
                other / nearest
            ),
            "these are ratios of mean distances: a copy is near to one training slice and as far from the "
            "others as anybody.": to_train.mean(1) / to_reference.mean(1),
            "one number holds for all samples: take the minimum of each row, not of the whole table.": (
                to_train.min() / to_reference.min()
            ).expand(4),
            "that is the distance to training only: a smooth image is near to everything, so divide by the "
            "distance to the reference.": nearest,
        },
    )
    return "the copy has a ratio of 0.04, the others are near 1."


# ---- 6.2 ----------------------------------------------------------------------------------------


def interval_of_difference(a, b, heads):
    """Scores (N,) and (N,) of the same slices, and the head of each, a list → (low, high)."""
    return evaluation.bootstrap(lambda i: float((a[i] - b[i]).mean()), heads)


def _by_slice(a, b, heads):
    return evaluation.bootstrap(lambda i: float((a[i] - b[i]).mean()), range(len(heads)))


def _drawn_apart(a, b, heads):
    return evaluation.bootstrap(lambda i, j: float(a[i].mean() - b[j].mean()), heads, heads)


def _side_by_side(a, b, heads):
    (low_a, high_a), (low_b, high_b) = (
        evaluation.bootstrap(lambda i, of=of: float(of[i].mean()), heads) for of in (a, b)
    )
    return low_a - high_b, high_a - low_b


def _backwards(a, b, heads):
    return interval_of_difference(b, a, heads)


def _scores():
    """Dice of 12 slices each of 20 heads under two models: heads differ much, the models only a little."""
    generator = torch.Generator().manual_seed(62)
    of_head, gain = torch.randn((2, 20, 1), generator=generator).double()
    noise = 0.005 * torch.randn((2, 20, 12), generator=generator).double()
    shared = 0.75 + 0.06 * (of_head - of_head.mean()) / of_head.std()
    better = shared + 0.018 + 0.02 * (gain - gain.mean()) / gain.std()
    heads = torch.arange(20).repeat_interleave(12).tolist()
    return (better + noise[0]).flatten(), (shared + noise[1]).flatten(), heads


def _diagnose_interval(interval_of_difference):
    scores = _scores()
    compare(
        interval_of_difference(*scores),
        _solved(),
        "the interval, [low, high],",
        {
            "that is the interval of b − a: a is the better one.": _backwards(*scores),
            "far too narrow: you drew slices, and the 12 slices of a head are not 12 observations. Give "
            "bootstrap the heads.": _by_slice(*scores),
            "far too wide: you drew heads for a and other heads for b, so what the heads do to both does not "
            "cancel. Take one draw for both.": _drawn_apart(*scores),
            "far too wide: that is made of two intervals. Bootstrap the difference itself.": _side_by_side(
                *scores
            ),
        },
        tolerance=0.2,
    )
    low, high = interval_of_difference(*scores)
    return f"a is better by {low:.3f} to {high:.3f}; two intervals side by side would have overlapped."


@cache
def _solved():
    return interval_of_difference(*_scores())


# ---- 6.3 ----------------------------------------------------------------------------------------


def fid_of_twins(count):
    """FID of two sets of so many features (count, 64), both drawn from one normal distribution."""
    x, y = torch.randn((2, count, 64))
    return evaluation.fid(x, y)


def _fid_of_itself(count):
    x = torch.randn((count, 64))
    return evaluation.fid(x, x)


def _kid_of_twins(count):
    return evaluation.kid(*torch.randn((2, count, 64)))[0]


def _fid_of_strangers(count):
    x, y = torch.randn((2, count, 64))
    return evaluation.fid(x, 2 * y)


def _always_as_many(count):
    return fid_of_twins(320)


def _of_eight_numbers(count):
    return evaluation.fid(*torch.randn((2, count, 8)))


COUNTS = (80, 320, 1280)


def _diagnose_fid(prediction, fid_of_twins):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(63)
        measured = [float(fid_of_twins(count)) for count in COUNTS]
    said = ", ".join(f"{value:.2f} at {count:,}" for count, value in zip(COUNTS, measured))
    if max(map(abs, measured)) < 1e-3:
        raise Wrong(f"it is {said}: did you compare a set with itself? Draw two sets.")
    if max(map(abs, measured)) < 0.1:
        raise Wrong(f"it is {said}: that is near 0 at every count, as KID is. Return FID.")
    if measured[0] < 1.3 * measured[2]:
        raise Wrong(f"it is {said}, whatever the count: does each set have `count` features?")
    if measured[2] > 5:
        raise Wrong(f"it is {said}, where the last should be near 0: do both sets have one distribution?")
    if not 20 < measured[0] < 40:
        raise Wrong(f"it is {said}, where the first should be near 28: has each feature 64 numbers?")
    if prediction != "down":
        raise Wrong(
            f"it goes down, not {prediction!r}: {said}, although both sets come from one distribution. "
            "Errors of means and covariances add distance, and more images have smaller errors."
            if prediction == "up"
            else f"it does not stay the same: {said}. That is KID; FID gets its errors added as distance."
        )
    return f"{said}: FID fell, and nothing got better but the number of images."


def _picture_of_fid(prediction, fid_of_twins):
    counts = (80, 160, 320, 640, 1280)
    names = [f"{count:,}" for count in counts]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(63)
        curves = {
            "FID": (names, [fid_of_twins(count) for count in counts]),
            "KID × 100": (names, [100 * _kid_of_twins(count) for count in counts]),
        }
    return plots.lines(curves, "features in each set", "distance (truth: 0)")


# ---- 6.4 ----------------------------------------------------------------------------------------

LEAST_CHANGE = 0.1  # root mean square, of [−1, 1]
BASELINE = "a blur of one pixel"


def fault(images):
    """Slices (B, 1, 64, 64) in [−1, 1] → as many spoiled ones, in [−1, 1]."""
    gain = torch.where(torch.arange(len(images)) % 2 == 0, 0.8, 1.25)[:, None, None, None]
    return ((images + 1) * gain - 1).clamp(-1, 1)  # a scanner whose gain is never right


def _blurred(images):
    return gaussian_blur(images, 9, 1.0)


@cache
def _clean():
    """96 real slices of heads that no network saw, their cases, features, and the segmenter."""
    location, segmenter = find_data(whole_cases=True), evaluation.load_segmenter()
    images, cases = [], []
    for folder in (location.validate, location.test):
        found = load_slices(folder, segmenter.image_size)
        rows = torch.linspace(0, len(found) - 1, 48).long()
        images.append(to_unit_range(found[rows]))
        cases += torch.tensor(OASISDataset(folder).case_ids)[rows].tolist()
    images = torch.cat(images)
    return images, cases, evaluation.embed(images, segmenter), segmenter


def _added(images):
    """What KID from the slices as they were gains if these take their place, and how much pixels change."""
    clean, cases, features, segmenter = _clean()
    before, after = (
        evaluation.kid(features, of, cases=(cases, cases))[0]
        for of in (features, evaluation.embed(images, segmenter))
    )
    return after - before, float((images - clean).square().mean().sqrt())


@cache
def _of_baseline():
    return _added(_blurred(_clean()[0]))


def _diagnose_fault(fault):
    clean = _clean()[0]
    images = fault(clean.clone())
    if not isinstance(images, torch.Tensor) or images.shape != clean.shape:
        shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise Wrong(f"you return {shape}: as many slices are wanted as come in, {tuple(clean.shape)}.")
    if not images.isfinite().all() or images.abs().max() > 1 + 1e-6:
        raise Wrong(
            f"values run from {images.min():.2f} to {images.max():.2f}: the judge would refuse them. "
            "Stay in [−1, 1], for example by .clamp(-1, 1)."
        )
    if (images - clean.flip(-2)).abs().mean() < 0.01:
        raise Wrong("that is the mirrored head of the notebook: invent a fault of your own.")
    added, change = _added(images)
    limit = _of_baseline()[0] / 10
    if change < LEAST_CHANGE:
        raise Wrong(f"pixels change by {change:.3f} only, and {LEAST_CHANGE} is asked: an eye must find it.")
    if added > limit:
        raise Wrong(
            f"the judge sees it: KID gains {added:.2f}, and at most {limit:.2f} counts as missed. "
            "Think of what the segmenter was taught to ignore."
        )
    return f"pixels change by {change:.2f}, KID by {added:+.2f}; {BASELINE} adds {_of_baseline()[0]:.2f}."


def _picture_of_fault(fault):
    few = _clean()[0][[8, 41, 72]]
    names = ["as it was"] * 3 + ["with the fault"] * 3
    return plots.grid(torch.cat([few, fault(few.clone())]), 3, names, 1.6)


EXERCISES = (
    Exercise(
        "6.1",
        "Nearer than chance",
        "line",
        6,
        (
            "Each row belongs to one sample; the nearest is the smallest of a row.",
            "`table.min(1).values` gives the smallest of each row: two of them, and one division.",
        ),
        _diagnose_relative,
        relative,
        (
            ((lambda t, r: r.min(1).values / t.min(1).values,), "upside down"),
            ((lambda t, r: t.mean(1) / r.mean(1),), "ratios of mean distances"),
            ((lambda t, r: (t.min() / r.min()).expand(4),), "the minimum of each row"),
            ((lambda t, r: t.min(0).values,), "has the shape (7,)"),
            ((lambda t, r: t.min(1).values,), "distance to training only"),
        ),
    ),
    Exercise(
        "6.2",
        "An interval that may be believed",
        "function",
        12,
        (
            "What is drawn by chance: slices or heads? And are the heads of `a` others than those of `b`?",
            "`bootstrap(statistic, heads)` gives `statistic` one tensor of indices; use it for `a` and `b`.",
            "The statistic is `lambda i: float((a[i] - b[i]).mean())`.",
        ),
        _diagnose_interval,
        interval_of_difference,
        (
            ((_by_slice,), "you drew slices"),
            ((_drawn_apart,), "Take one draw for both"),
            ((_side_by_side,), "made of two intervals"),
            ((_backwards,), "the interval of b − a"),
            ((lambda a, b, heads: float((a - b).mean()),), "has the shape ()"),
        ),
    ),
    Exercise(
        "6.3",
        "Does FID need a better model to fall?",
        "experiment",
        10,
        (
            "`torch.randn((count, 64))` draws a set; the other one is drawn in the same way, anew.",
            "`x, y = torch.randn((2, count, 64))` draws both, and `evaluation.fid(x, y)` compares them.",
        ),
        _diagnose_fid,
        fid_of_twins,
        (
            (("down", _fid_of_itself), "a set with itself"),
            (("down", _kid_of_twins), "as KID is"),
            (("down", _fid_of_strangers), "do both sets have one distribution?"),
            (("down", _always_as_many), "does each set have `count` features?"),
            (("down", _of_eight_numbers), "has each feature 64 numbers?"),
            (("the same", fid_of_twins), "it does not stay the same"),
            (("up", fid_of_twins), "it goes down"),
        ),
        prediction="down",
        alternatives=("up", "the same"),
        picture=_picture_of_fid,
    ),
    Exercise(
        "6.4",
        "A fault of your own",
        "open",
        20,
        (
            "The segmenter was trained to find tissues whatever the brightness, the noise and the side.",
            "KID compares sets. A fault of each head may cancel in the set: too bright here, too dark there.",
            "`(images + 1) * gain - 1`, with a gain (B, 1, 1, 1) that is 0.8 and 1.25 in turn.",
        ),
        _diagnose_fault,
        fault,
        (
            ((lambda images: images,), "pixels change by 0.000 only"),
            ((_blurred,), "the judge sees it"),
            ((lambda images: images.flip(-2),), "invent a fault of your own"),
            ((lambda images: images * 1.5,), "the judge would refuse them"),
            ((lambda images: images[:1],), "as many slices are wanted"),
        ),
        picture=_picture_of_fault,
    ),
)
