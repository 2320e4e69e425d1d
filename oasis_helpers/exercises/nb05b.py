"""Exercises of notebook 5b: the known part of a hole, the walk between noises, returns, and a better map."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from .. import plots
from ..data import read_slices, to_unit_range
from ..diffusion import NoiseSchedule
from ..intake.phantoms import make_phantoms, phantom_cache, plant_lesion
from ..sampling import clipped, sample_images, slerp
from ..training import load_weights
from . import Exercise, Wrong, compare

# ---- 5b.1 ---------------------------------------------------------------------------------------


def put_back(x, image, hole, schedule, t, noise):
    return torch.where(hole, x, schedule.q_sample(image, t, noise))


def _clean(x, image, hole, schedule, t, noise):
    return torch.where(hole, x, image)


def _inside_out(x, image, hole, schedule, t, noise):
    return torch.where(hole, schedule.q_sample(image, t, noise), x)


def _all_known(x, image, hole, schedule, t, noise):
    return schedule.q_sample(image, t, noise)


def _diagnose_put_back(put_back) -> str:
    drawn, schedule, t = torch.Generator().manual_seed(0), NoiseSchedule.cosine(1000), 600
    x, noise = torch.randn(2, 1, 1, 8, 8, generator=drawn, dtype=torch.float64)
    image, hole = torch.zeros_like(x) - 0.5, torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    hole[..., 2:5, 2:5] = True
    wanted = torch.where(hole, x, schedule.q_sample(image, t, noise))
    mistakes = {
        f"the known part is clean, and what is in the hole has the noise of t = {t}. The network is told one t for "
        "both: noise the known part to t first.": _clean(x, image, hole, schedule, t, noise),
        "inside and outside are exchanged: `hole` is True where the network fills in.": _inside_out(x, image, hole, schedule, t, noise),
        "the hole is filled with the image itself, which nobody knows there.": _all_known(x, image, hole, schedule, t, noise),
    }  # fmt: skip
    compare(put_back(x, image, hole, schedule, t, noise), wanted, "x", mistakes)
    return "inside the sample, outside the image, both with the noise of t."


# ---- 5b.2 ---------------------------------------------------------------------------------------


def along_the_sphere(a, b, w):
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


def _along_the_line(a, b, w):
    return (1 - w) * a + w * b


def _from_the_other_end(a, b, w):
    return along_the_sphere(a, b, 1 - w)


def _undivided(a, b, w):
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b


def _diagnose_sphere(along_the_sphere) -> str:
    drawn, w = torch.Generator().manual_seed(1), 0.25
    a = torch.randn(4096, generator=drawn, dtype=torch.float64)
    b = 0.5 * a + 0.75**0.5 * torch.randn(4096, generator=drawn, dtype=torch.float64)  # not at right angles
    line = _along_the_line(a, b, 0.5).std()
    mistakes = {
        f"that is the straight line. Half-way on it the standard deviation is {line:.2f} and not 1, and the network "
        "takes it for less noise than it is told.": _along_the_line(a, b, w),
        "you start from the other end: at w = 0 the answer is a.": _from_the_other_end(a, b, w),
        "you did not divide by the sine of the angle: at w = 0 the answer has to be a itself.": _undivided(
            a, b, w
        ),
    }
    compare(
        along_the_sphere(a, b, w),
        slerp(a[None], b[None], w)[0],
        "the noise a quarter of the way",
        mistakes,
        tolerance=1e-3,
    )
    return "as long as its ends at every stop."


# ---- 5b.3 ---------------------------------------------------------------------------------------

DEPTHS = (149, 349, 599)


@cache
def _network():
    return clipped(load_weights())


@cache
def _healthy_slices() -> Tensor:
    found = read_slices(make_phantoms(phantom_cache()).test, 64)
    return to_unit_range(found.images[found.plane == 16])[:4]


def change(come_down, schedule, x, t, noise):
    returned = come_down(schedule.q_sample(x, t, noise), t)
    return float((returned - x).abs().mean())


def _not_noised(come_down, schedule, x, t, noise):
    return float((come_down(x, t) - x).abs().mean())


def _signed(come_down, schedule, x, t, noise):
    return float((come_down(schedule.q_sample(x, t, noise), t) - x).mean())


def _come_down(x_t: Tensor, t: int) -> Tensor:
    return sample_images(_network(), len(x_t), steps=10, start=(x_t, t), method="dpm_solver").cpu()


def _changes(change) -> list[float]:
    x, schedule = _healthy_slices(), _network().schedule
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    return [float(change(_come_down, schedule, x, t, noise)) for t in DEPTHS]


_right_changes = cache(lambda: _changes(change))


def _diagnose_change(prediction, change) -> str:
    found, right = _changes(change), _right_changes()
    mistakes = {
        "you hand over the clean slice and say that it has the noise of t. Noise it first, with `schedule.q_sample`.": _changes(_not_noised),
        "brighter and darker places cancel: take absolute values before the mean.": _changes(_signed),
    }  # fmt: skip
    compare(found, right, f"the change from t = {DEPTHS}", mistakes, tolerance=0.02)
    said = "As you said" if prediction == "it grows" else f"You said {prediction!r}, but"
    return (
        f"{said}: a healthy slice changes by {', '.join(f'{v:.2f}' for v in found)}. The deeper, the more of the map is "
        "the person and not the lesion; too shallow, and the lesion comes back as well."
    )


# ---- 5b.4 ---------------------------------------------------------------------------------------

GAIN = 0.05


@cache
def _patients() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slices of 16 heads with a planted dark lesion, restored from t = 349, the lesions, and the brains."""
    found = read_slices(make_phantoms(phantom_cache()).train, 64, masks=True)
    rows = (found.plane == 16).nonzero()[:16, 0]
    rng, healthy = np.random.default_rng(3), to_unit_range(found.images[rows])[:, 0].numpy()
    planted = [plant_lesion(i, m.numpy(), rng) for i, m in zip(healthy, found.masks[rows])]
    sick = torch.stack([torch.from_numpy(image).float() for image, _ in planted])[:, None]
    lesions = torch.stack([torch.from_numpy(lesion) for _, lesion in planted])
    noise = torch.randn(2, *sick.shape, generator=torch.Generator().manual_seed(4))
    schedule = _network().schedule
    restored = torch.stack([_come_down(schedule.q_sample(sick, 349, n), 349) for n in noise]).mean(0)
    return sick, restored, lesions, found.masks[rows] > 0


def my_map(x, restored):
    darker = (restored - x).clamp(min=0)
    return F.avg_pool2d(darker, 5, stride=1, padding=2)


def _plain(x, restored):
    return (restored - x).abs()


def _backwards(x, restored):
    return F.avg_pool2d(x - restored, 5, stride=1, padding=2)


def _one_number(x, restored):
    return (restored - x).abs().mean()


def _auroc(amap: Tensor) -> float:
    _, _, lesions, brain = _patients()
    each = [binary_auroc(m[b], lesion[b].long()) for m, lesion, b in zip(amap[:, 0].float(), lesions, brain)]
    return float(torch.stack(each).mean())


def _diagnose_map(my_map) -> str:
    sick, restored, *_ = _patients()
    amap = my_map(sick, restored)
    if tuple(getattr(amap, "shape", ())) != tuple(sick.shape):
        raise Wrong(f"a map of the shape {tuple(sick.shape)} is wanted, a number for each pixel.")
    base, found = _auroc(_plain(sick, restored)), _auroc(amap)
    if found < 0.5:
        raise Wrong(
            f"AUROC {found:.2f}, less than guessing: your map is high where the slice is brighter than restored. The "
            "lesions are dark."
        )
    if found < base + GAIN:
        raise Wrong(
            f"AUROC {found:.2f}; the plain absolute difference has {base:.2f}, and {base + GAIN:.2f} is asked for. What do you "
            "know of the lesions that the difference does not: their sign, their size?"
        )
    return f"AUROC {found:.2f}, where the plain difference has {base:.2f}."


@torch.no_grad()
def _maps(my_map) -> Figure:
    sick, restored, lesions, _ = _patients()
    amap = my_map(sick, restored)
    rows = [sick, restored, _plain(sick, restored) * 2 - 1, 2 * amap / amap.amax((1, 2, 3), keepdim=True) - 1]
    pictures = [row[i] for row in (*rows, lesions[:, None] * 2.0 - 1) for i in range(4)]
    names = [
        n if i == 0 else "" for n in ("slice", "restored", "difference", "map", "truth") for i in range(4)
    ]
    windows = [plots.BRAIN] * 8 + [plots.WHOLE] * 12
    return plots.grid(pictures, 4, names, 1.4, "synthetic – not for diagnosis", window=windows)


EXERCISES = (
    Exercise(
        "5b.1", "The known part", "line", 5,
        hints=(
            "The network is told one timestep for the whole picture. How noisy must the known part be?",
            "`torch.where(hole, x, …)` takes x inside; outside stands `schedule.q_sample(image, t, noise)`.",
        ),
        diagnose=_diagnose_put_back, solution=put_back,
        wrong=(
            ((_clean,), "noise the known part to t first"),
            ((_inside_out,), "inside and outside are exchanged"),
            ((_all_known,), "which nobody knows there"),
        ),
    ),
    Exercise(
        "5b.2", "Along the sphere", "function", 10,
        hints=(
            "The angle between the two comes from their dot product: `torch.acos((a * b).sum() / (a.norm() * b.norm()))`.",
            "The weights are sin((1 − w)·angle) and sin(w·angle), both divided by sin(angle).",
        ),
        diagnose=_diagnose_sphere, solution=along_the_sphere,
        wrong=(
            ((_along_the_line,), "that is the straight line"),
            ((_from_the_other_end,), "you start from the other end"),
            ((_undivided,), "divide by the sine of the angle"),
        ),
    ),
    Exercise(
        "5b.3", "How deep?", "experiment", 10,
        hints=(
            "Noise the slice to t, bring it back with `come_down`, and compare it with the slice.",
            "`come_down(schedule.q_sample(x, t, noise), t)` is what comes back; take the mean of the absolute difference.",
        ),
        diagnose=_diagnose_change, solution=change, prediction="it grows",
        alternatives=("it falls", "it stays"),
        wrong=(
            (("it grows", _not_noised), "Noise it first"),
            (("it stays", _signed), "take absolute values before the mean"),
        ),
    ),
    Exercise(
        "5b.4", "A better map", "open", 25,
        hints=(
            "The lesions are dark: what does the sign of the difference tell you?",
            "A lesion has dozens of pixels, a slip of the sampler one or two: smooth the map, for example by "
            "`F.avg_pool2d(darker, 5, stride=1, padding=2)`.",
        ),
        diagnose=_diagnose_map, solution=my_map, picture=_maps,
        wrong=(
            ((_plain,), "their sign, their size?"),
            ((_backwards,), "The lesions are dark"),
            ((_one_number,), "a number for each pixel"),
        ),
    ),
)  # fmt: skip
