"""Exercises of notebook 1: range, order, split, distances between slices, and a check of one's own."""

from __future__ import annotations

from functools import cache

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import plots
from ..data import Slices, read_slices, to_unit_range
from ..intake.phantoms import make_phantoms, phantom_cache
from . import Exercise, Wrong, compare

SIZE, FAR = 32, 24  # pixels of the slices here, and the largest gap that is looked at


@cache
def head_slices() -> Slices:
    """The training slices of the phantoms that come with the course, at 32×32."""
    return read_slices(make_phantoms(phantom_cache()).train, SIZE)


# ---- 1.1 ----------------------------------------------------------------------------------------


def to_network(pixels):
    return pixels.float() / 127.5 - 1


def _by_255(pixels):
    return pixels.float() / 255


def _by_128(pixels):
    return pixels.float() / 128 - 1


def _as_bytes(pixels):
    return pixels / 127.5 - 1 if pixels.is_floating_point() else (pixels // 127 - 1)


def _diagnose_range(to_network) -> str:
    pixels = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    mistakes = {
        "your values run from 0 to 1. Noise lies on both sides of 0, so the image has to as well: the middle "
        "of the range must become 0.": _by_255(pixels),
        "white comes out as 0.992 and not as 1: there are 255 steps between 0 and 255, so half of the range "
        "is 127.5.": _by_128(pixels),
    }
    found = to_network(pixels)
    if isinstance(found, Tensor) and not found.is_floating_point():
        raise Wrong(f"your values are {found.dtype}: bytes have nothing below 0, make floats of them first.")
    compare(found, to_unit_range(pixels), "the image for bytes 0, 51, 255", mistakes)
    return "black is −1, white is 1, and the middle of the range is 0."


# ---- 1.2 ----------------------------------------------------------------------------------------


def deal(cases, parts):
    number = {case: i for i, case in enumerate(sorted(set(cases)))}
    return [number[case] % parts for case in cases]


def _slice_by_slice(cases, parts):
    return [i % parts for i in range(len(cases))]


def _in_blocks(cases, parts):
    return [i * parts // len(cases) for i in range(len(cases))]


def _all_together(cases, parts):
    return [0 for _ in cases]


def _diagnose_deal(deal) -> str:
    heads = [case for case in (7, 3, 12, 9, 4, 21, 1, 30) for _ in range(5)]
    parts = 3
    found = [int(part) for part in deal(list(heads), parts)]
    if len(found) != len(heads):
        raise Wrong(f"{len(heads)} slices went in and {len(found)} parts came out: give one for each slice.")
    if not set(found) <= set(range(parts)):
        raise Wrong(f"the parts are {sorted(set(found))}: number them from 0 to {parts - 1}.")
    of_head = {case: sorted({part for c, part in zip(heads, found) if c == case}) for case in heads}
    torn = {case: where for case, where in of_head.items() if len(where) > 1}
    if torn:
        case, where = next(iter(torn.items()))
        raise Wrong(
            f"slices of case {case} are in the parts {where}. A network tested on one of them has seen its "
            "neighbours in training. Deal the cases, not the slices."
        )
    sizes = [sum(where == [part] for where in of_head.values()) for part in range(parts)]
    if max(sizes) - min(sizes) > 1:
        raise Wrong(f"the parts have {sizes} heads: they should differ by one at most.")
    return f"{len(of_head)} heads in parts of {sizes}, and none of them in two."


# ---- 1.3 ----------------------------------------------------------------------------------------


def mean_distance(x, case, plane, gap):
    apart = torch.cdist(x, x) / x.shape[1] ** 0.5
    chosen = (case[:, None] == case) & ((plane[:, None] - plane).abs() == gap)
    return float(apart[chosen].mean())


def _of_all_heads(x, case, plane, gap):
    apart = torch.cdist(x, x) / x.shape[1] ** 0.5
    return float(apart[(plane[:, None] - plane).abs() == gap].mean())


def _one_way_without_a_root(x, case, plane, gap):
    apart = torch.cdist(x, x)
    return float(apart[(case[:, None] == case) & ((plane[:, None] - plane).abs() == gap)].mean())


@cache
def _flat() -> tuple[Tensor, Tensor, Tensor]:
    found = head_slices()
    return to_unit_range(found.images).flatten(1).double(), found.case, found.plane


@cache
def _crossing() -> tuple[dict[int, float], float, int]:
    """Mean distances within a head by gap, that to other heads at one height, and the first gap beyond it."""
    x, case, plane = _flat()
    apart, same = torch.cdist(x, x) / x.shape[1] ** 0.5, case[:, None] == case
    gaps = (plane[:, None] - plane).abs()
    other = float(apart[~same & (gaps == 0)].mean())
    within = {gap: float(apart[same & (gaps == gap)].mean()) for gap in range(1, FAR + 1)}
    return within, other, next(gap for gap, value in within.items() if value > other)


def _diagnose_distance(prediction, mean_distance) -> str:
    within, other, first = _crossing()
    x, case, plane = _flat()
    asked = [mean_distance(x, case, plane, gap) for gap in (1, 8)]
    mistakes = {
        "that is the mean over all pairs of planes so far apart, those of other heads included: choose "
        "pairs of one case.": [_of_all_heads(x, case, plane, gap) for gap in (1, 8)],
        "that is the length of the difference, which grows with the number of pixels: divide by its root to "
        "have it for each pixel.": [_one_way_without_a_root(x, case, plane, gap) for gap in (1, 8)],
    }
    compare(asked, [within[1], within[8]], "the distance for gaps 1 and 8", mistakes)
    said = "As you said" if prediction == "over 10" else f"You said {prediction!r}"
    return (
        f"{said}: only {first} planes (and mm) away is a slice of the same head as far as the same slice of "
        f"another head ({other:.2f}). So a split by slice leaves a near copy for every test slice."
    )


def _distances(prediction, mean_distance) -> Figure:
    within, other, _ = _crossing()
    gaps = list(within)
    curves = {
        "another plane of the same head": (gaps, list(within.values())),
        "the same plane of other heads": (gaps, [other] * len(gaps)),
    }
    return plots.lines(curves, "planes between the two slices", "distance", title="who is nearer?")


# ---- 1.4 ----------------------------------------------------------------------------------------


def suspicious(image):
    border = torch.cat([image[:2].flatten(), image[-2:].flatten(), image[:, :2].flatten()])
    middle = image[8:24, 8:24]
    upper, lower = image[:16].mean(), image[16:].mean()
    return bool(border.mean() > -0.8 or middle.std() < 0.05 or (upper - lower).abs() > 0.3)


def _never(image):
    return False


def _always(image):
    return True


def _damaged() -> dict[str, Tensor]:
    """Slices with four kinds of damage, 12 of each."""
    images = to_unit_range(head_slices().images[8::96])[:12, 0]
    half = images.clone()
    half[:, 16:] = -1
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return {
        "cut in half": half, "inverted": -images, "shifted to [0, 1]": images / 2 + 0.5,
        "buried in noise": (images + noise).clamp(-1, 1),
    }  # fmt: skip


def _diagnose_check(suspicious) -> str:
    sound = to_unit_range(head_slices().images[16::32])[:, 0]
    false_alarms = sum(bool(suspicious(image)) for image in sound)
    if false_alarms > len(sound) // 10:
        raise Wrong(
            f"{false_alarms} of {len(sound)} sound slices are called suspicious. Nobody reads a list that "
            "holds everything: look at what sound slices have in common first."
        )
    found = {kind: sum(bool(suspicious(i)) for i in images) for kind, images in _damaged().items()}
    missed = [kind for kind, count in found.items() if count < 9]
    if missed:
        raise Wrong(
            f"of 12 slices each, you find {', '.join(f'{n} {kind}' for kind, n in found.items())}. What does "
            f"a slice that is {missed[0]} have at its border, in its middle or in its two halves?"
        )
    accused = f"{false_alarms} of {len(sound)} sound ones accused"
    return f"{sum(found.values())} of 48 damaged slices found, {accused}."


EXERCISES = (
    Exercise(
        "1.1", "Bytes for a network", "line", 3,
        hints=(
            "Which byte must become 0?",
            "Half of 255 is 127.5: divide by it and subtract 1, as floats.",
        ),
        diagnose=_diagnose_range, solution=to_network,
        wrong=(
            ((_by_255,), "run from 0 to 1"),
            ((_by_128,), "white comes out as 0.992"),
            ((_as_bytes,), "make floats of them first"),
        ),
    ),
    Exercise(
        "1.2", "Deal heads, not slices", "function", 8,
        hints=(
            "Number the cases, not the slices; a case keeps its number in all of its slices.",
            "With `number = {case: i for i, case in enumerate(sorted(set(cases)))}` the part is "
            "`number[case] % parts`.",
        ),
        diagnose=_diagnose_deal, solution=deal,
        wrong=(
            ((_slice_by_slice,), "Deal the cases, not the slices"),
            ((_in_blocks,), "Deal the cases, not the slices"),
            ((_all_together,), "differ by one at most"),
        ),
    ),
    Exercise(
        "1.3", "Who is nearer?", "experiment", 10,
        hints=(
            "All distances at once are `torch.cdist(x, x)`, a square; choose in it by a square of True and "
            "False.",
            "`case[:, None] == case` says which pairs are of one head, and how far they are apart says "
            "`(plane[:, None] - plane).abs()`. Divide by the root of the number of pixels.",
        ),
        diagnose=_diagnose_distance, solution=mean_distance, prediction="over 10", picture=_distances,
        alternatives=("about 2", "about 5"),
        wrong=(
            (("over 10", _of_all_heads), "choose pairs of one case"),
            (("about 5", _one_way_without_a_root), "divide by its root"),
        ),
    ),
    Exercise(
        "1.4", "A check of your own", "open", 20,
        hints=(
            "Look at some sound slices and some damaged ones first: border, middle, left and right half.",
            "Sound slices have air, −1, at the border; a middle that is not flat; and two halves of about "
            "the same brightness. Three thresholds are enough.",
        ),
        diagnose=_diagnose_check, solution=suspicious,
        wrong=(((_never,), "you find 0 cut in half"), ((_always,), "sound slices are called suspicious")),
    ),
)  # fmt: skip
