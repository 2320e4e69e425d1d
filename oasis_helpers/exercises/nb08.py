"""Exercises of notebook 8: the scale, a negative prompt, latents that are moved, and a head in two kilobytes."""

from __future__ import annotations

from functools import cache

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import plots
from ..autoencoder import Autoencoder, load_autoencoder, load_stable_diffusion
from ..data import read_slices, to_unit_range
from ..intake.phantoms import make_phantoms, phantom_cache
from ..prompts import tokenize
from ..sampling import guided, sample_images
from . import Exercise, Wrong, compare

# ---- 8.1 ----------------------------------------------------------------------------------------


def decode_with(decoder, shift, scale, latents):
    return decoder(latents * scale + shift)


def _encodes(decoder, shift, scale, latents):
    return decoder(latents / scale + shift)


def _shift_first(decoder, shift, scale, latents):
    return decoder((latents + shift) * scale)


def _forgotten(decoder, shift, scale, latents):
    return decoder(latents)


def _without_shift(decoder, shift, scale, latents):
    return decoder(latents * scale)


def _diagnose_decode(decode_with) -> str:
    latents, shift, scale = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0]), torch.tensor([4.0, 3.0])
    how = (lambda z: z), shift, scale, latents
    mistakes = {
        "you divide by the scale: that is what encoding does.": _encodes(*how),
        "first the scale, then the shift: encoding subtracts the shift before it divides.": _shift_first(
            *how
        ),
        "scale and shift are forgotten, the most frequent mistake of all.": _forgotten(*how),
        "the shift is missing.": _without_shift(*how),
    }
    compare(decode_with(*how), latents * scale + shift, "what the decoder gets", mistakes)
    return "the way back of (z − shift) / scale."


# ---- 8.2 ----------------------------------------------------------------------------------------


def away_from(denoise, x, t, wanted, avoided, s):
    second = denoise(x, t, avoided)
    return second + s * (denoise(x, t, wanted) - second)


def _away_from_nothing(denoise, x, t, wanted, avoided, s):
    second = denoise(x, t, None)
    return second + s * (denoise(x, t, wanted) - second)


def _towards(denoise, x, t, wanted, avoided, s):
    first = denoise(x, t, wanted)
    return first + s * (denoise(x, t, avoided) - first)


def _three_terms(denoise, x, t, wanted, avoided, s):
    nothing = denoise(x, t, None)
    return nothing + s * (denoise(x, t, wanted) - denoise(x, t, avoided))


def _diagnose_away(away_from) -> str:
    worth = {None: 1.0, "thin scalp": 10.0, "thick scalp": 100.0}

    def tells(x, t, y):  # a "network" whose estimate says what it was told
        return x + worth[y]

    how = tells, torch.zeros(1), 500, "thin scalp", "thick scalp", 3.0
    mistakes = {
        "that is plain guidance, away from nothing: what is to be avoided was never told.": _away_from_nothing(
            *how
        ),
        "you run towards what is to be avoided: exchange the two.": _towards(*how),
        "you begin at the estimate that was told nothing. For s = 1 it should be the estimate of what is wanted; yours is "
        "not.": _three_terms(*how),
    }
    wanted = worth["thick scalp"] + 3.0 * (worth["thin scalp"] - worth["thick scalp"])
    compare(away_from(*how), torch.tensor([wanted]), "the estimate for s = 3", mistakes)
    return "the avoided words stand where the empty prompt stood. Where both are the same, s does nothing."


class _Led:
    """The shipped denoiser, led away from something by a rule such as :func:`away_from`."""

    def __init__(self, denoise, rule, avoided: str, s: float = 3.0):
        self.schedule, self.shape, self.device = denoise.schedule, denoise.shape, denoise.device
        self._how = denoise, rule, {"prompt": tokenize(avoided)}, s

    def __call__(self, x, t, y=None):
        denoise, rule, avoided, s = self._how
        return rule(denoise, x, t, y, avoided, s)


def _heads_led_away(away_from) -> Figure:
    """One noise and one wish, led away from nothing and from two words."""
    denoise, autoencoder = load_stable_diffusion()
    ways = [guided(denoise, 3.0), *(_Led(denoise, away_from, f"{much} atrophy") for much in ("marked", "no"))]
    how = {"method": "dpm_solver", "steps": 12, "seed": 1, "y": {"prompt": tokenize("lateral ventricles")}}
    pictures = [autoencoder.decode(sample_images(way, 1, **how))[0] for way in ways]
    names = ["lateral ventricles, s = 3", 'away from "marked atrophy"', 'away from "no atrophy"']
    return plots.grid(pictures, 3, names, 2.4, "synthetic – not for diagnosis")


# ---- 8.3 ----------------------------------------------------------------------------------------


@cache
def _autoencoder() -> Autoencoder:
    return load_autoencoder()


@cache
def _heads() -> tuple[Tensor, Tensor]:
    """Four held-out heads (4, 1, 256, 256) and their latents."""
    found = read_slices(make_phantoms(phantom_cache()).test, 256)
    rows = torch.arange(3, len(found.images), len(found.images) // 4)[:4]
    heads = to_unit_range(found.images[rows])
    with torch.no_grad():
        return heads, _autoencoder().encode(heads)


def psnr(images: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio of images in [−1, 1], dB."""
    return float(10 * torch.log10(4 / (images - others).square().mean()))


def decode_moved(autoencoder, latents):
    return autoencoder.decode(latents.roll(1, dims=-1))


def _channels_moved(autoencoder, latents):
    return autoencoder.decode(latents.roll(1, dims=1))


def _rows_moved(autoencoder, latents):
    return autoencoder.decode(latents.roll(1, dims=-2))


def _image_moved(autoencoder, latents):
    return autoencoder.decode(latents).roll(1, dims=-1)


@torch.no_grad()
def _diagnose_moved(prediction, decode_moved) -> str:
    autoencoder, (_, latents) = _autoencoder(), _heads()
    found, there = decode_moved(autoencoder, latents), autoencoder.decode(latents)
    if not isinstance(found, Tensor) or found.shape != there.shape:
        raise Wrong(f"images of the shape {tuple(there.shape)} are wanted.")
    known = {
        "you moved the channels: each place then has its four numbers in another order, and that is no head.": _channels_moved(autoencoder, latents),
        "you moved by a row, which is the other axis.": _rows_moved(autoencoder, latents),
        "you moved the image by one pixel, not its latents by one place.": _image_moved(autoencoder, latents),
    }  # fmt: skip
    for message, made in known.items():
        if psnr(found, made) > 60:
            raise Wrong(message)
    compare(found, autoencoder.decode(latents.roll(1, dims=-1)), "the image", tolerance=1e-3)
    said = "As you said" if prediction == "it moves by 8 pixels" else f"You said {prediction!r}, but"
    return (
        f"{said}: it is the same head, 8 pixels on along the stored rows ({psnr(found, there.roll(8, dims=-1)):.0f} dB). Places stay "
        "places, which is why a U-Net made for images works among latents."
    )


@torch.no_grad()
def _moved(prediction, decode_moved) -> Figure:
    autoencoder, (_, latents) = _autoencoder(), _heads()
    pictures = [
        autoencoder.decode(latents[:1]),
        decode_moved(autoencoder, latents[:1]),
        _channels_moved(autoencoder, latents[:1]),
    ]
    names = ["as it is", "latents moved by a place", "channels in another order"]
    return plots.grid([p[0] for p in pictures], 3, names, 2.2)


# ---- 8.4 ----------------------------------------------------------------------------------------

MOST_VALUES, LEAST_PSNR = 16, 32.5


def rounded(latents):
    values = torch.linspace(-3, 3, 16)
    return values[(latents[..., None] - values).abs().argmin(-1)]


def _whole_numbers(latents):
    return latents.round()


def _untouched(latents):
    return latents


def _equal_shares(latents):
    values = torch.quantile(latents.flatten(), (torch.arange(16) + 0.5) / 16)
    return values[(latents[..., None] - values).abs().argmin(-1)]


@torch.no_grad()
def _diagnose_rounded(rounded) -> str:
    heads, latents = _heads()
    made = rounded(latents)
    if not isinstance(made, Tensor) or made.shape != latents.shape:
        raise Wrong(f"latents of the shape {tuple(latents.shape)} are wanted, as they were given.")
    count = len(made.unique())
    if count > MOST_VALUES:
        raise Wrong(f"{count:,} different values: at most {MOST_VALUES}, so that each fits into four bits.")
    found = psnr(_autoencoder().decode(made), heads)
    if found < LEAST_PSNR:
        raise Wrong(
            f"{count} values, and {found:.1f} dB, where {LEAST_PSNR} is asked for ({psnr(_autoencoder().decode(latents), heads):.1f} "
            "without rounding). Where do most latents lie, and what does one error far out do?"
        )
    return f"{count} values and {found:.1f} dB: a head of 65,536 pixels in two kilobytes."


@torch.no_grad()
def _after_rounding(rounded) -> Figure:
    heads, latents = _heads()
    made = _autoencoder().decode(rounded(latents[:1]))
    pictures, names = (
        [heads[0], made[0], 4 * (made - heads[:1])[0]],
        ["slice", "from two kilobytes", "difference × 4"],
    )
    return plots.grid(pictures, 3, names, 2.2)


EXERCISES = (
    Exercise(
        "8.1", "The scale on the right side", "line", 4,
        hints=(
            "Encoding is (z − shift) / scale. Which operation is undone first?",
            "`decoder(latents * scale + shift)`: multiply first, then add.",
        ),
        diagnose=_diagnose_decode, solution=decode_with,
        wrong=(
            ((_encodes,), "you divide by the scale"),
            ((_shift_first,), "first the scale, then the shift"),
            ((_forgotten,), "scale and shift are forgotten"),
            ((_without_shift,), "the shift is missing"),
        ),
    ),
    Exercise(
        "8.2", "Away from a word", "function", 10,
        hints=(
            "In plain guidance the second estimate is told nothing. What is it told here?",
            "`second = denoise(x, t, avoided)`, then `second + s * (denoise(x, t, wanted) - second)`.",
        ),
        diagnose=_diagnose_away, solution=away_from, picture=_heads_led_away,
        wrong=(
            ((_away_from_nothing,), "what is to be avoided was never told"),
            ((_towards,), "exchange the two"),
            ((_three_terms,), "For s = 1 it should be the estimate of what is wanted"),
        ),
    ),
    Exercise(
        "8.3", "Latents that are moved", "experiment", 8,
        hints=(
            "Latents are (B, 4, 32, 32): channels, rows, columns. `roll` moves along an axis.",
            "`autoencoder.decode(latents.roll(1, dims=-1))`.",
        ),
        diagnose=_diagnose_moved, solution=decode_moved, prediction="it moves by 8 pixels", picture=_moved,
        alternatives=("it moves by 1 pixel", "it falls apart"),
        wrong=(
            (("it moves by 8 pixels", _channels_moved), "you moved the channels"),
            (("it falls apart", _rows_moved), "which is the other axis"),
            (("it moves by 1 pixel", _image_moved), "not its latents by one place"),
        ),
    ),
    Exercise(
        "8.4", "A head in two kilobytes", "open", 25,
        hints=(
            "32×32×4 numbers of four bits are 2,048 bytes. Choose 16 values, and give each latent the nearest.",
            "Evenly from −3 to 3, `torch.linspace(-3, 3, 16)`, passes. What would values with equal shares of latents do?",
        ),
        diagnose=_diagnose_rounded, solution=rounded, picture=_after_rounding,
        wrong=(
            ((_untouched,), "so that each fits into four bits"),
            ((_whole_numbers,), "Where do most latents lie"),
            ((_equal_shares,), "what does one error far out do"),
        ),
    ),
)  # fmt: skip
