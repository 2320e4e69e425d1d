"""Exercises of notebook 7: two conventions, guiding one factor, likeness under guidance, a scale of one's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import plots
from ..evaluation import anatomy, load_segmenter, segment
from ..sampling import Denoiser, clipped, guided, sample_images
from ..training import GUIDED, load_weights
from . import Exercise, Wrong, compare

# ---- 7.1 ----------------------------------------------------------------------------------------


def in_w(told, untold, w):
    return (1 + w) * told - w * untold


def _as_s(told, untold, w):
    return untold + w * (told - untold)


def _exchanged(told, untold, w):
    return (1 + w) * untold - w * told


def _added(told, untold, w):
    return (1 + w) * told + w * untold


def _diagnose_in_w(in_w) -> str:
    told, untold, w = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]), 1.0
    mistakes = {
        "w is read as s: w = 1 gives no guidance, and w = 0 would ignore the wish.": _as_s(told, untold, w),
        "the halves are exchanged: you run towards the estimate that was told nothing.": _exchanged(
            told, untold, w
        ),
        "a plus stands in place of the minus: the two weights have to add up to 1.": _added(told, untold, w),
    }
    compare(in_w(told, untold, w), (1 + w) * told - w * untold, "the estimate for w = 1", mistakes)
    return "w = 0 is the plain conditional estimate, and s = 1 + w."


# ---- 7.2 ----------------------------------------------------------------------------------------


def atrophy_only(denoise, x, t, y, s):
    without_atrophy = {name: values for name, values in y.items() if name != "atrophy"}
    second = denoise(x, t, without_atrophy)
    return second + s * (denoise(x, t, y) - second)


def _against_nothing(denoise, x, t, y, s):
    second = denoise(x, t, None)
    return second + s * (denoise(x, t, y) - second)


def _both_told(denoise, x, t, y, s):
    second = denoise(x, t, y)
    return second + s * (denoise(x, t, y) - second)


def _only_atrophy(denoise, x, t, y, s):
    second = denoise(x, t, {"atrophy": y["atrophy"]})
    return second + s * (denoise(x, t, y) - second)


def _without_scale(denoise, x, t, y, s):
    return denoise(x, t, y)


def _diagnose_atrophy_only(atrophy_only) -> str:
    asked: list[set] = []
    worth = {"height": 1.0, "atrophy": 10.0, "head": 100.0}

    def tells(x, t, y):  # a "network" whose estimate says what it was told
        # nothing may be left out or written down: NaN, and −1 for a label
        asked.append({name for name, value in (y or {}).items() if bool((value >= 0).all())})
        return x + sum(worth[name] for name in asked[-1])

    x, y = torch.zeros(1), {"height": torch.ones(1), "atrophy": torch.ones(1), "head": torch.zeros(1)}
    found = atrophy_only(tells, x, 500, y, 2.0)
    told = sorted(asked, key=len)
    if len(told) < 2 or len(told[0]) == 3:
        raise Wrong(
            "both estimates are told everything, so that s does nothing: withhold the atrophy from one."
        )
    if not told[0]:
        raise Wrong("one half is told nothing: then the height and the head are exaggerated as well.")
    if "atrophy" in told[0]:
        raise Wrong(
            "the atrophy is still told to both halves; what is missing in one is what gets exaggerated."
        )
    compare(found, x + 111.0 + 10.0, "the estimate for s = 2")
    return "height and head are told to both halves, and only the atrophy is exaggerated."


# ---- 7.3 ----------------------------------------------------------------------------------------

SCALES, PEOPLE = (1, 4), 5


@cache
def _network() -> Denoiser:
    return load_weights(GUIDED)


def _asked() -> dict[str, Tensor]:
    wish = {"height": 12.0, "atrophy": 0.9}
    told = {name: torch.full((PEOPLE,), value) for name, value in wish.items()}
    return told | {"head": torch.full((PEOPLE,), 2)}


def _drawn(by) -> Tensor:
    """Five people, the same for every way ``by`` of estimating, (5, 1, 64, 64)."""
    noise = torch.randn(PEOPLE, 1, 64, 64, generator=torch.Generator().manual_seed(3))
    start = noise, by.schedule.T - 1
    return sample_images(clipped(by), PEOPLE, method="dpm_solver", steps=12, start=start, y=_asked()).cpu()


@cache
def people(scale: float) -> Tensor:
    """Five people asked for one wish with guidance ``scale``."""
    return _drawn(guided(_network(), scale))


def apart(x):
    pairs = (x[:, None] - x[None]).square().flatten(2).mean(2).sqrt()
    return float(pairs.sum() / (len(x) * (len(x) - 1)))


def _with_themselves(x):
    return float((x[:, None] - x[None]).square().flatten(2).mean(2).sqrt().mean())


def _of_neighbouring_pixels(x):
    return float(x.std())


def _diagnose_apart(prediction, apart) -> str:
    found = [float(apart(people(s))) for s in SCALES]
    mistakes = {
        "everybody is also compared with himself, and those distances are 0: divide by the number of pairs of "
        "*different* people.": [_with_themselves(people(s)) for s in SCALES],
        "that is the spread of all pixels, of brain and air. Compare person with person, at the same pixel.": [
            _of_neighbouring_pixels(people(s)) for s in SCALES
        ],
    }
    compare(
        found, [_right_apart(s) for s in SCALES], f"the distance at s = {SCALES}", mistakes, tolerance=0.01
    )
    folds = "contrast grows with s as well, which moves people apart"
    said = "As you said" if prediction == "about as far" else f"You said {prediction!r}, but"
    return (
        f"{said}: {found[0]:.2f} at s = {SCALES[0]}, {found[1]:.2f} at s = {SCALES[1]}. To the eye they grow more alike, and "
        f"MS-SSIM agrees; but {folds}. One figure of variety is not variety."
    )


_right_apart = cache(lambda scale: apart(people(scale)))


# ---- 7.4 ----------------------------------------------------------------------------------------

LEAST_FLUID, MOST_BRIGHT, LARGEST_STEP = 0.37, 0.25, 0.05


def my_scale(t):
    return 1 + 5 * max(0.0, 1 - abs(t - 400) / 300)


def _in_an_interval(t):
    return 4.0 if 200 <= t <= 700 else 1.0


def _always_four(t):
    return 4.0


def _always_a_little_more(t):
    return 1.8


def _always_one(t):
    return 1.0


def _over_t(my_scale) -> Denoiser:
    """The network guided by another scale at each timestep."""
    network = _network()

    def estimate(x: Tensor, t: Tensor, y) -> Tensor:
        return guided(network, float(my_scale(int(t[0]))))(x, int(t[0]), y)

    return Denoiser(estimate, network.schedule, "sample", network.shape)


def _symptoms(heads: Tensor) -> tuple[float, float]:
    fluid = float(anatomy(segment(heads, load_segmenter()))["CSF"].mean())
    return fluid, float(heads.quantile(0.99))


def _diagnose_scale(my_scale) -> str:
    values = [my_scale(t) for t in range(1000)]
    if not all(isinstance(value, int | float) and 0 <= value <= 20 for value in values):
        raise Wrong(f"s at t = 0, 300, 600, 999 is {values[::300]}: give a number from 0 to 20 for each t.")
    steps = [abs(after - before) for before, after in pairwise(values)]
    if max(steps) > LARGEST_STEP:
        at = steps.index(max(steps))
        raise Wrong(
            f"between t = {at} and {at + 1} s jumps by {max(steps):.2f}: from one t to the next {LARGEST_STEP} is allowed. "
            "Let it rise and fall on the way."
        )
    fluid, bright = _symptoms(_drawn(_over_t(my_scale)))
    if fluid < LEAST_FLUID:
        raise Wrong(
            f"the fluid is {fluid:.2f} of the brain, less than {LEAST_FLUID}: the wish is not exaggerated enough. At which t "
            "is it decided how large the ventricles are?"
        )
    if bright > MOST_BRIGHT:
        raise Wrong(
            f"one pixel in a hundred is brighter than {bright:.2f}, where {MOST_BRIGHT} is allowed: too much contrast. At "
            "which t does a strong s do nothing but harden it?"
        )
    return f"fluid {fluid:.2f} and bright {bright:.2f}: the wish is exaggerated, the contrast hardly."


@torch.no_grad()
def _own_heads(my_scale: Callable[[int], float]) -> Figure:
    rows = {"s = 1": people(1), "s = 4": people(4), "by your scale": _drawn(_over_t(my_scale))}
    names = [name if column == 0 else "" for name in rows for column in range(PEOPLE)]
    return plots.grid(torch.cat([*rows.values()]), PEOPLE, names, 1.3, "synthetic – not for diagnosis")


EXERCISES = (
    Exercise(
        "7.1", "Guidance in w", "line", 4,
        hints=(
            "Ho and Salimans weigh the told estimate with 1 + w and the other with −w.",
            "`(1 + w) * told - w * untold`; for w = 0 nothing but `told` is left.",
        ),
        diagnose=_diagnose_in_w, solution=in_w,
        wrong=(
            ((_as_s,), "w is read as s"),
            ((_exchanged,), "the halves are exchanged"),
            ((_added,), "a plus stands in place of the minus"),
        ),
    ),
    Exercise(
        "7.2", "Exaggerate the atrophy alone", "function", 10,
        hints=(
            "What is exaggerated is the difference of the two estimates. What must the second be told, so that only the "
            "atrophy differs?",
            '`{name: values for name, values in y.items() if name != "atrophy"}` is the wish without it; then '
            "`second + s * (first - second)`.",
        ),
        diagnose=_diagnose_atrophy_only, solution=atrophy_only,
        wrong=(
            ((_against_nothing,), "one half is told nothing"),
            ((_both_told,), "so that s does nothing"),
            ((_only_atrophy,), "the atrophy is still told to both halves"),
            ((_without_scale,), "so that s does nothing"),
        ),
    ),
    Exercise(
        "7.3", "Do they grow alike?", "experiment", 12,
        hints=(
            "`x[:, None] - x[None]` holds all differences, (N, N, 1, H, W); flatten the last three axes.",
            "Sum the distances of all pairs and divide by N · (N − 1), for the N pairs of a head with itself count 0.",
        ),
        diagnose=_diagnose_apart, solution=apart, prediction="about as far",
        alternatives=("closer together", "farther apart"),
        wrong=(
            (("closer together", _with_themselves), "pairs of *different* people"),
            (("about as far", _of_neighbouring_pixels), "Compare person with person"),
        ),
    ),
    Exercise(
        "7.4", "A scale of your own", "open", 20,
        hints=(
            "Read the section on the interval again: what can a strong push near T − 1 still throw away, and what is left "
            "to decide near 0?",
            "A tent passes: 1 at t = 100 and 700, 6 at t = 400, straight lines between.",
        ),
        diagnose=_diagnose_scale, solution=my_scale, picture=_own_heads,
        wrong=(
            ((_always_four,), "too much contrast"),
            ((_always_a_little_more,), "too much contrast"),
            ((_always_one,), "not exaggerated enough"),
            ((_in_an_interval,), "s jumps by 3.00"),
        ),
    ),
)  # fmt: skip
