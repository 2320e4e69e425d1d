"""Exercises of notebook 2: one jump, the product of a schedule, equal SNR, and a schedule of one's own."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import plots
from ..data import load_slices, to_unit_range
from ..diffusion import NoiseSchedule
from ..intake.phantoms import make_phantoms, phantom_cache
from . import Exercise, Wrong, compare

T = 1000

# ---- 2.1 ----------------------------------------------------------------------------------------


def jump(x0, noise, alpha_bar):
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise


def _without_roots(x0, noise, alpha_bar):
    return alpha_bar * x0 + (1 - alpha_bar) * noise


def _one_root_for_both(x0, noise, alpha_bar):
    return alpha_bar**0.5 * x0 + (1 - alpha_bar**0.5) * noise


def _exchanged(x0, noise, alpha_bar):
    return (1 - alpha_bar) ** 0.5 * x0 + alpha_bar**0.5 * noise


def _diagnose_jump(jump) -> str:
    drawn = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4096, generator=drawn, dtype=torch.float64)
    abar = 0.36
    mistakes = {}
    for wrong, hint in (
        (_without_roots, "did you forget the roots? ᾱ and 1 − ᾱ are variances, and a variance of 0.64 is "
         "made by a factor of 0.8"),
        (_one_root_for_both, "1 − √ᾱ is not √(1 − ᾱ): take the root after the subtraction"),
        (_exchanged, "image and noise are exchanged: at t = 0 nearly all should be image"),
    ):  # fmt: skip
        rest = wrong(0 * x0, noise, abar).var()
        mistakes[
            f"at ᾱ = 0.36 the noise in x_t has a variance of {rest:.2f} where 0.64 is right; {hint}."
        ] = wrong(x0, noise, abar)
    compare(jump(x0, noise, abar), _right(x0, noise, abar), "x_t", mistakes)
    return "the jump holds √ᾱ of the image and noise of variance 1 − ᾱ."


def _right(x0: Tensor, noise: Tensor, abar: float) -> Tensor:
    schedule = NoiseSchedule(torch.tensor([1 - abar], dtype=torch.float64))
    return schedule.q_sample(x0, 0, noise)


# ---- 2.2 ----------------------------------------------------------------------------------------


def cumulative(betas):
    product, found = 1.0, []
    for beta in betas:
        product = product * (1 - beta)
        found.append(product)
    return found


def _to_the_end(betas):
    return [cumulative(betas)[-1]] * len(betas)


def _off_by_one(betas):
    return [1.0, *cumulative(betas)[:-1]]


def _product_of_betas(betas):
    return torch.as_tensor(betas).cumprod(0).tolist()


def _diagnose_cumulative(cumulative) -> str:
    betas = [0.1, 0.2, 0.5, 0.25]
    mistakes = {
        "every entry is the product to the end, so that every timestep is as noisy as the last: entry t holds "
        "the factors 0 … t.": _to_the_end(betas),
        "entry 0 is 1, so that t = 0 has no noise: then the noise that a network should find there is not in "
        "its input. Entry 0 holds the factor 0 already.": _off_by_one(betas),
        "that is the product of the β. What stays of the image's variance in a step is 1 − β.":
            _product_of_betas(betas),
    }  # fmt: skip
    found = torch.as_tensor(list(cumulative(betas)), dtype=torch.double)
    compare(
        found, NoiseSchedule(torch.tensor(betas)).alphas_cumprod, "ᾱ for β = 0.1, 0.2, 0.5, 0.25", mistakes
    )
    return "ᾱ falls from 1 − β₀, and each entry has one factor more."


# ---- 2.3 ----------------------------------------------------------------------------------------


def same_snr(t, one, other):
    return int((other.snr().log() - one.snr()[t].log()).abs().argmin())


def _same_t(t, one, other):
    return t


def _farthest(t, one, other):
    return int((other.snr() - one.snr()[t]).abs().argmax())


def _by_beta(t, one, other):
    return int((other.betas - one.betas[t]).abs().argmin())


ASKED = (100, 300, 500)


def _diagnose_snr(prediction, same_snr) -> str:
    linear, cosine = NoiseSchedule.linear(T), NoiseSchedule.cosine(T)
    for t in ASKED:
        found = int(same_snr(t, linear, cosine))
        if not 0 <= found < T:
            raise Wrong(f"{found} is no timestep: they go from 0 to {T - 1}.")
        wanted, got = float(linear.snr()[t]), float(cosine.snr()[found])
        if abs(got / wanted - 1) > 0.02:
            raise Wrong(
                f"linear t = {t} has SNR {wanted:.3g}, and cosine t = {found}, which you give, has {got:.3g}. "
                "Look for the place where the two are nearest, in `other.snr()`."
            )
    said = "As you said" if prediction == "the same" else f"You said {prediction!r}, and yet"
    return (
        f"{said}: linear at t = 300 and cosine at t = {same_snr(300, linear, cosine)} are the same picture. A "
        "schedule only says when each noise level comes."
    )


def _pairs(prediction, same_snr) -> Figure:
    slices = load_slices(make_phantoms(phantom_cache()).train, 64, cases=1)
    x0, noise = (
        to_unit_range(slices[16:17]),
        torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(5)),
    )
    linear, cosine = NoiseSchedule.linear(T), NoiseSchedule.cosine(T)
    places = [(linear, t, "linear") for t in ASKED]
    places += [(cosine, same_snr(t, linear, cosine), "cosine") for t in ASKED]
    pictures = [schedule.q_sample(x0, t, noise) for schedule, t, _ in places]
    windows = [plots.window_at(schedule, t) for schedule, t, _ in places]
    return plots.grid(pictures, 3, [f"{name}, t = {t}" for _, t, name in places], 1.6, window=windows)


# ---- 2.4 ----------------------------------------------------------------------------------------

LEAST = 0.7  # of the timesteps in the part of λ where a picture changes


def my_alpha_bar(u):
    return torch.sigmoid(6 - 14 * u)


def _never_noise(u):
    return 1 - 0.9 * u


def _rises(u):
    return 0.5 + 0.4 * torch.sin(6 * u)


def _lost_at_once(u):
    return torch.exp(-40 * u) * 0.999


def _lambda(my_alpha_bar) -> Tensor:
    """½ ln SNR of the learner's curve at all timesteps, (T,)."""
    u = torch.arange(1, T + 1, dtype=torch.float64) / T
    abar = torch.as_tensor(my_alpha_bar(u), dtype=torch.float64)
    if abar.shape != u.shape:
        raise Wrong(f"{T} values went in and the shape {tuple(abar.shape)} came out: give ᾱ for each u.")
    if not ((abar > 0) & (abar < 1)).all():
        raise Wrong(
            f"ᾱ runs from {float(abar.min()):.3g} to {float(abar.max()):.3g}: it lies between 0 and 1."
        )
    if not (abar.diff() < 0).all():
        at = int((abar.diff() >= 0).nonzero()[0])
        raise Wrong(f"ᾱ does not fall at u = {at / T:.2f}: no step of the forward process takes noise away.")
    return 0.5 * (abar / (1 - abar)).log()


def _diagnose_schedule(my_alpha_bar) -> str:
    curve = _lambda(my_alpha_bar)
    if curve[-1] > -3.5:
        raise Wrong(
            f"λ ends at {curve[-1]:.1f}: some of the image is left in the last x_t, and sampling, which starts "
            "from pure noise, would start elsewhere. Let it end below −3.5."
        )
    seen = float(((curve > -2) & (curve < 3)).double().mean())
    if seen < LEAST:
        raise Wrong(
            f"{seen:.0%} of the timesteps lie between λ = 3 and −2, where the picture changes; linear has 62 %, "
            f"cosine 89 %. Give at least {LEAST:.0%} to this part: where is your curve too steep?"
        )
    return (
        f"a schedule that falls to λ = {curve[-1]:.1f} and spends {seen:.0%} of its steps where it matters."
    )


def _own_curve(my_alpha_bar) -> Figure:
    own = NoiseSchedule.linear(T), NoiseSchedule.cosine(T)
    curves = {
        "linear": own[0].half_log_snr(),
        "cosine": own[1].half_log_snr(),
        "yours": _lambda(my_alpha_bar),
    }
    return plots.lines({n: (range(T), c) for n, c in curves.items()}, "t", "λ = ½ ln SNR")


EXERCISES = (
    Exercise(
        "2.1", "The jump", "line", 4,
        hints=(
            "The *variance* of the noise in x_t is 1 − ᾱ. By which factor do you multiply noise of variance 1?",
            "Both factors are roots: `alpha_bar**0.5` for the image, `(1 - alpha_bar)**0.5` for the noise.",
        ),
        diagnose=_diagnose_jump, solution=jump,
        wrong=(
            ((_without_roots,), "the noise in x_t has a variance of 0.41 where 0.64 is right; did you forget "
             "the roots?"),
            ((_one_root_for_both,), "take the root after the subtraction"),
            ((_exchanged,), "image and noise are exchanged"),
        ),
    ),
    Exercise(
        "2.2", "From β to ᾱ", "function", 6,
        hints=(
            "Go through the β in order and keep one number: the product so far.",
            "Multiply the product by 1 − β *before* you append it, so that entry 0 holds the first factor.",
        ),
        diagnose=_diagnose_cumulative, solution=cumulative,
        wrong=(
            ((_to_the_end,), "entry t holds the factors 0 … t"),
            ((_off_by_one,), "Entry 0 holds the factor 0 already"),
            ((_product_of_betas,), "What stays of the image's variance in a step is 1 − β"),
        ),
    ),
    Exercise(
        "2.3", "Equal SNR", "experiment", 10,
        hints=(
            "`one.snr()[t]` is a number, `other.snr()` has one for each timestep: where is the difference least?",
            "SNRs span many powers of ten, so compare logarithms: "
            "`(other.snr().log() - one.snr()[t].log()).abs().argmin()`.",
        ),
        diagnose=_diagnose_snr, solution=same_snr, prediction="the same", picture=_pairs,
        alternatives=("different",),
        wrong=(
            (("the same", _same_t), "which you give, has"),
            (("different", _farthest), "where the two are nearest"),
            (("the same", _by_beta), "where the two are nearest"),
        ),
    ),
    Exercise(
        "2.4", "A schedule of your own", "open", 20,
        hints=(
            "Begin with the logarithm: choose how λ falls with u, for SNR = e^(2λ) and ᾱ = SNR / (1 + SNR).",
            "A straight line from λ = 3 to λ = −4 is `torch.sigmoid(2 * (3 - 7 * u))`.",
        ),
        diagnose=_diagnose_schedule, solution=my_alpha_bar, picture=_own_curve,
        wrong=(
            ((_never_noise,), "some of the image is left in the last x_t"),
            ((_rises,), "no step of the forward process takes noise away"),
            ((_lost_at_once,), "where is your curve too steep?"),
        ),
    ),
)  # fmt: skip
