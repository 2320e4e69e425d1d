"""Exercises of notebook 5: a step without fresh noise, a whole sampler, what the start decides, and six calls."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import plots
from ..data import load_slices, to_unit_range
from ..diffusion import Denoiser
from ..intake.phantoms import make_phantoms, phantom_cache
from ..sampling import clipped, ddim_step, sample_images
from ..training import load_weights
from . import Exercise, Unfilled, Wrong, compare

T = 1000

# ---- 5.1 ----------------------------------------------------------------------------------------


def go_back(x_t, x0, abar_t, abar_s):
    noise = (x_t - abar_t**0.5 * x0) / (1 - abar_t) ** 0.5
    return abar_s**0.5 * x0 + (1 - abar_s) ** 0.5 * noise


def _keeps_x_t(x_t, x0, abar_t, abar_s):
    return abar_s**0.5 * x0 + (1 - abar_s) ** 0.5 * x_t


def _noise_of_another_size(x_t, x0, abar_t, abar_s):
    noise = x_t - abar_t**0.5 * x0
    return abar_s**0.5 * x0 + (1 - abar_s) ** 0.5 * noise


def _without_roots(x_t, x0, abar_t, abar_s):
    noise = (x_t - abar_t * x0) / (1 - abar_t)
    return abar_s * x0 + (1 - abar_s) * noise


def _diagnose_step(go_back) -> str:
    drawn = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2048, generator=drawn, dtype=torch.float64)
    abar_t, abar_s = 0.2, 0.7
    x_t = abar_t**0.5 * x0 + (1 - abar_t) ** 0.5 * noise
    how = x_t, x0, abar_t, abar_s
    mistakes = {
        "x_t itself stands where its noise should: x_t holds image as well. Take the image out of it first.": _keeps_x_t(*how),
        "the noise you take out of x_t is not of variance 1: divide it by √(1 − ᾱ_t).": _noise_of_another_size(*how),
        "did you forget the roots? ᾱ and 1 − ᾱ are variances.": _without_roots(*how),
    }  # fmt: skip
    wanted = abar_s**0.5 * x0 + (1 - abar_s) ** 0.5 * noise
    compare(go_back(*how), wanted, "x_s", mistakes)
    return "the noise found in x_t is kept, and image and noise are mixed anew."


# ---- 5.2 ----------------------------------------------------------------------------------------


@cache
def network() -> Denoiser:
    """The network that ships, its estimates held within [−1, 1]."""
    return clipped(load_weights())


@cache
def noise() -> Tensor:
    """Four draws of noise, (4, 1, 64, 64)."""
    return torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(5))


def my_sampler(denoise, schedule, x, timesteps):
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1]):
        x = ddim_step(schedule, denoise(x, t), t, t_prev, x)
    return x


def _stops_early(denoise, schedule, x, timesteps):
    for t, t_prev in pairwise(timesteps):
        x = ddim_step(schedule, denoise(x, t), t, t_prev, x)
    return x


def _tells_the_next(denoise, schedule, x, timesteps):
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1]):
        x = ddim_step(schedule, denoise(x, max(t_prev, 0)), t, t_prev, x)
    return x


def _one_estimate(denoise, schedule, x, timesteps):
    x0 = denoise(x, timesteps[0])
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1]):
        x = ddim_step(schedule, x0, t, t_prev, x)
    return x


@torch.no_grad()
def _diagnose_sampler(my_sampler) -> str:
    timesteps = [999, 749, 499, 249]
    how = network(), network().schedule, noise()[:1], timesteps
    found = my_sampler(*how)
    mistakes = {
        "your last step ends at t = 249, with all its noise. After the last timestep comes −1, no noise.": _stops_early(*how),
        "the network is told the timestep that you go *to*. It has to be told how noisy x is now.": _tells_the_next(*how),
        "one estimate serves all steps, so you end at it: ask the network again in each.": _one_estimate(*how),
    }  # fmt: skip
    compare(found, my_right_sampler(*how), "the sample", mistakes, tolerance=1e-3)
    return "from noise to a head in four calls; with twenty it would be a good one."


my_right_sampler = my_sampler


@torch.no_grad()
def _sampled(my_sampler) -> Figure:
    timesteps = list(range(999, -1, -50))
    heads = my_sampler(network(), network().schedule, noise(), timesteps)
    return plots.grid(heads, 4, size=1.9, title="twenty calls · synthetic – not for diagnosis")


# ---- 5.3 ----------------------------------------------------------------------------------------


@cache
def _mean_slice() -> Tensor:
    return to_unit_range(load_slices(make_phantoms(phantom_cache()).train, 64)).mean(0)


def likeness(a, b, mean):
    return float(torch.cosine_similarity((a - mean).flatten(1), (b - mean).flatten(1)).mean())


def _with_the_mean(a, b, mean):
    return float(torch.cosine_similarity(a.flatten(1), b.flatten(1)).mean())


def _only_one(a, b, mean):
    return float(torch.cosine_similarity((a - mean).flatten(1), b.flatten(1)).mean())


@cache
def _pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Heads from one start by two seeds with η = 1, and by 10 and 20 steps with η = 0."""
    how = {"method": "ddim", "start": (noise(), T - 1)}
    random = [sample_images(network(), 4, steps=20, eta=1.0, seed=seed, **how) for seed in (1, 2)]
    plain = [sample_images(network(), 4, steps=steps, **how) for steps in (10, 20)]
    return {"η = 1, two seeds": tuple(random), "η = 0, 10 and 20 steps": tuple(plain)}


def _diagnose_likeness(prediction, likeness) -> str:
    def of(measure) -> list[float]:
        return [float(measure(a, b, _mean_slice())) for a, b in _pairs().values()]

    found = of(likeness)
    mistakes = {
        "all heads look alike before the mean head is subtracted from both: what is left is what makes a person.": of(_with_the_mean),
        "the mean head is subtracted from one of the two only.": of(_only_one),
    }  # fmt: skip
    compare(found, of(_right_likeness), "the likeness", mistakes, tolerance=1e-3)
    said = "As you said" if prediction == "other heads" else f"You said {prediction!r}, but"
    return (
        f"{said}: with η = 1 the two seeds give heads that correlate by {found[0]:.1f} only; with η = 0 ten and twenty "
        f"steps from one start by {found[1]:.1f}. Without fresh noise the start decides the head."
    )


_right_likeness = likeness


# ---- 5.4 ----------------------------------------------------------------------------------------

CALLS, MOST_OFF = 6, 0.064


@cache
def _solution() -> Tensor:
    start = noise(), T - 1
    return sample_images(load_weights(), 4, method="dpm_solver", steps=60, start=start)


def my_timesteps():
    return [999, 900, 750, 550, 350, 150]


def _even():
    return [999, 832, 666, 499, 332, 166]


def _dense_below():
    return [999, 700, 500, 300, 150, 50]


def _begins_too_low():
    return [900, 750, 550, 350, 200, 100]


@torch.no_grad()
def _along(timesteps: list[int]) -> Tensor:
    denoise = load_weights()
    return my_right_sampler(denoise, denoise.schedule, noise(), timesteps)


def _off(timesteps: list[int]) -> float:
    return float((_along(timesteps) - _solution()).square().flatten(1).mean(1).sqrt().mean())


def _diagnose_timesteps(my_timesteps) -> str:
    found = my_timesteps()
    if any(t is Ellipsis for t in found):
        raise Unfilled
    found = [int(t) for t in found]
    if len(found) != CALLS or found != sorted(set(found), reverse=True) or not 0 <= found[-1] < found[0] < T:
        raise Wrong(f"{found}: give {CALLS} different timesteps from 999 down to 0.")
    if found[0] < T - 1:
        raise Wrong(
            f"you begin at t = {found[0]}: x is noise alone there, and the network is told that some image is left in it. "
            "Begin at 999."
        )
    off = _off(found)
    if off > MOST_OFF:
        raise Wrong(
            f"rms {off:.3f} to the careful solution; evenly spaced timesteps reach {_off(_even()):.3f}, and {MOST_OFF} is asked for. "
            "Where does the estimate still change most: high up, or near the end?"
        )
    return f"rms {off:.3f} to the careful solution, where even timesteps reach {_off(_even()):.3f}."


def _with_six(my_timesteps) -> Figure:
    rows = {"evenly": _along(_even()), "yours": _along(my_timesteps()), "60 careful": _solution()}
    names = [name if i == 0 else "" for name in rows for i in range(4)]
    return plots.grid(torch.cat([*rows.values()]), 4, names, 1.6, "six calls · synthetic – not for diagnosis")


EXERCISES = (
    Exercise(
        "5.1", "A step without fresh noise", "line", 6,
        hints=(
            "x_t is √ᾱ_t · image + √(1 − ᾱ_t) · noise. You have x_t and the image: what is the noise?",
            "`noise = (x_t - abar_t**0.5 * x0) / (1 - abar_t) ** 0.5`; then mix it with the image as s wants it.",
        ),
        diagnose=_diagnose_step, solution=go_back,
        wrong=(
            ((_keeps_x_t,), "Take the image out of it first"),
            ((_noise_of_another_size,), "not of variance 1"),
            ((_without_roots,), "did you forget the roots?"),
        ),
    ),
    Exercise(
        "5.2", "A whole sampler", "function", 10,
        hints=(
            "Go through pairs of neighbouring timesteps; behind the last stands −1, no noise.",
            "In each: `x = ddim_step(schedule, denoise(x, t), t, t_prev, x)`.",
        ),
        diagnose=_diagnose_sampler, solution=my_sampler, picture=_sampled,
        wrong=(
            ((_stops_early,), "After the last timestep comes −1"),
            ((_tells_the_next,), "how noisy x is now"),
            ((_one_estimate,), "ask the network again in each"),
        ),
    ),
    Exercise(
        "5.3", "What does the start decide?", "experiment", 10,
        hints=(
            "Subtract the mean head from both, or all heads are alike.",
            "`torch.cosine_similarity((a - mean).flatten(1), (b - mean).flatten(1)).mean()`.",
        ),
        diagnose=_diagnose_likeness, solution=likeness, prediction="other heads",
        alternatives=("the same heads", "similar heads"),
        wrong=(
            (("other heads", _with_the_mean), "before the mean head is subtracted"),
            (("the same heads", _only_one), "from one of the two only"),
        ),
    ),
    Exercise(
        "5.4", "Six calls", "open", 20,
        hints=(
            "Under much noise the estimate changes fast from one t to the next; near the end it hardly does.",
            "999, then a short step, then longer ones: 900, 750, … Why is the first step special?",
        ),
        diagnose=_diagnose_timesteps, solution=my_timesteps, picture=_with_six,
        wrong=(
            ((_even,), "evenly spaced timesteps reach"),
            ((_dense_below,), "Where does the estimate still change most"),
            ((_begins_too_low,), "Begin at 999"),
        ),
    ),
)  # fmt: skip
