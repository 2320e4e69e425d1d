"""Does a network obey? What it was asked for beside what came, and what obedience costs.

``python benchmarks/obedience.py [FOLDER]`` asks the guided network for the height, atrophy and head size of
fresh phantom heads, in about 20 minutes on one thread, and measures its samples as it measures these heads
themselves, which have just these values: samples of a perfect generator would look as obedient as they do.
FOLDER is what ``guided.py`` has filled; without it the weights that ship are taken. Each way to guide also
gets its KID and how much its images differ at equal wishes.

A head is measured by kernel ridge regression (Saunders et al. 1998, ICML 15, 515) on the segmenter's
bottleneck, fitted to the 900 fresh heads that are not asked for here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from judge import STEPS, draw, judge_of, machine, mirrored
from scipy import stats
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor
from tqdm import tqdm

from oasis_helpers.conditions import load_conditioned
from oasis_helpers.data import read_slices, to_unit_range
from oasis_helpers.evaluation import Segmenter, bootstrap, embed
from oasis_helpers.phantoms import fresh_heads
from oasis_helpers.sampling import autoguided, guided, limited
from oasis_helpers.training import GUIDED, load_weights, pick_device

RESULT = Path(__file__).with_name("obedience.json")
COUNT = 180  # heads asked for, of the 300 that are a perfect generator's
SCALES = (0, 1, 2, 4)
INTERVAL, RESCALE, AUTO = (200, 700), 0.7, 2.0
FACTORS = ("height", "atrophy", "head")  # mm, 0 to 1, and 0, 1 or 2
GAMMA, RIDGE = 0.5, 0.03  # of the kernel exp(−γ d² / D), and what is added to its diagonal
ROUNDS = 400


# ---- measuring a head ---------------------------------------------------------------------------


class Measurer:
    """Reads the factors off images (B, 1, 64, 64) in [−1, 1]: (B, 3), in the order of ``FACTORS``.

    Fitted to ``images`` and their ``wanted`` values (N, 3), each also with left and right exchanged.
    """

    def __init__(self, segmenter: Segmenter, images: Tensor, wanted: Tensor):
        self.segmenter = segmenter
        x = np.concatenate([self._maps(images), self._maps(mirrored(images))])
        self.mean, self.deviation = x.mean(0), x.std(0) + 1e-3
        self.centre = wanted.numpy().mean(0)
        self.ridge = KernelRidge(alpha=RIDGE, kernel="rbf", gamma=GAMMA / x.shape[1])
        self.ridge.fit(self._standard(x), np.tile(wanted.numpy() - self.centre, (2, 1)))

    @torch.no_grad()
    def _maps(self, images: Tensor) -> np.ndarray:
        unet, found = self.segmenter.unet, []
        for part in images.split(64):
            emb = unet.embed(torch.zeros(len(part), dtype=torch.long))
            found.append(F.avg_pool2d(unet.encode(part, *emb)[0], 2).flatten(1))
        return torch.cat(found).numpy()

    def _standard(self, maps: np.ndarray) -> np.ndarray:
        return ((maps - self.mean) / self.deviation).astype(np.float64)

    def __call__(self, images: Tensor) -> Tensor:
        both = (self.ridge.predict(self._standard(self._maps(x))) for x in (images, mirrored(images)))
        return torch.from_numpy(sum(both) / 2 + self.centre)


# ---- what obedience is --------------------------------------------------------------------------


def obedience(asked: Tensor, measured: Tensor) -> dict[str, float]:
    """Correlation "r", "slope" of measured over asked, and mean absolute "error", of two (N,)."""
    line = stats.linregress(asked.double(), measured.double())
    return {
        "r": float(line.rvalue),
        "slope": float(line.slope),
        "error": float((measured - asked).abs().double().mean()),
    }


def thirds(measured: Tensor) -> Tensor:
    """Where measured sizes of fresh heads are cut into small, medium and large: (2,)."""
    return measured.double().quantile(torch.tensor([1 / 3, 2 / 3], dtype=torch.double))


def spread(features: Tensor, asked: Tensor) -> float:
    """How much images differ that were asked for alike: variance of features left when ``asked`` is known.

    ``features`` (N, D), ``asked`` (N, K): the mean over features of the variance around a quadratic in all
    that was asked for.
    """
    x = (asked - asked.mean(0)).double()
    x = x / x.std(0)
    pairs = torch.combinations(torch.arange(x.shape[1]), with_replacement=True)
    design = torch.cat([torch.ones(len(x), 1), x, x[:, pairs[:, 0]] * x[:, pairs[:, 1]]], 1)
    left = features.double() - design @ torch.linalg.lstsq(design, features.double()).solution
    return float(left.square().sum(0).mean() / (len(x) - design.shape[1]))


def summary(asked: Tensor, measured: Tensor, fresh: Tensor) -> dict[str, dict[str, float]]:
    """:func:`obedience` of each factor, with "…, low" and "…, high" (95 %, bootstrap by head).

    ``asked``, ``measured`` and ``fresh``, what was measured on the fresh heads of these very values: (N, 3).
    "error above fresh" is by how much the error is larger than on these; of the label also "right", the share
    that lies in the third asked for.
    """
    found = {}
    for place, name in enumerate(FACTORS):
        a, m, f = (values[:, place].contiguous() for values in (asked, measured, fresh))

        def figures(rows: Tensor, a=a, m=m, f=f, name=name) -> dict[str, float]:
            seen = obedience(a[rows], m[rows])
            seen["error above fresh"] = seen["error"] - float((f - a)[rows].abs().double().mean())
            if name == "head":
                seen["right"] = float((torch.bucketize(m, thirds(f)) == a)[rows].double().mean())
            return seen

        found[name] = with_intervals(figures, len(a))
    return found


def with_intervals(figures: Callable[[Tensor], dict[str, float]], count: int) -> dict[str, float]:
    """What a function of rows finds in all ``count`` of them, with the interval of each figure."""
    found, drawn = figures(torch.arange(count)), []
    bootstrap(lambda rows: drawn.append(figures(rows)) or 0.0, range(count), rounds=ROUNDS)
    for name in [*found]:
        low, high = np.quantile([draw[name] for draw in drawn], [0.025, 0.975])
        found |= {f"{name}, low": float(low), f"{name}, high": float(high)}
    return {name: round(value, 4) for name, value in found.items()}


def recentred(found: dict[str, float]) -> dict[str, float]:
    """A figure with its interval as wide as it was and around it, for a spread.

    Heads that are drawn twice are fitted better by what was asked for, so that spreads of bootstrap samples
    come out too small, all by about the same.
    """
    name = next(iter(found))
    value, half = found[name], (found[f"{name}, high"] - found[f"{name}, low"]) / 2
    return {name: value, f"{name}, low": round(value - half, 4), f"{name}, high": round(value + half, 4)}


# ---- the run ------------------------------------------------------------------------------------


def ways(denoise, weak: dict) -> dict[str, tuple]:
    """Denoisers to compare by name, and how often each calls a network as large as this in a step."""
    low, high = INTERVAL
    found = {f"s = {s}": (guided(denoise, s), 1 if s in (0, 1) else 2) for s in SCALES}
    most = SCALES[-1]
    share = (high - low + 1) / denoise.schedule.T
    found[f"s = {most}, t = {low} … {high}"] = limited(guided(denoise, most), denoise, low, high), 1 + share
    found[f"s = {most}, rescaled by {RESCALE}"] = guided(denoise, most, RESCALE), 2
    for name, other in weak.items():
        found[f"s = {AUTO:g} from the {name} network"] = autoguided(denoise, other, AUTO), 2
    return found


def main() -> None:
    device = pick_device()
    path = Path(sys.argv[1]) / GUIDED.name if len(sys.argv) > 1 else GUIDED
    denoise = load_weights(path, device)
    weak = {
        name: load_weights(other, device)
        for name in ("early", "small")
        if (other := path.with_stem(f"{path.stem}-{name}")).exists()
    }
    judge, known = judge_of(), load_conditioned(fresh_heads(), Segmenter.image_size, "test")
    case = read_slices(fresh_heads().test, Segmenter.image_size).case
    wanted = torch.stack([known.y[name].double() for name in FACTORS], 1)
    rest = ~torch.isin(case, torch.tensor(judge.real.others.cases))
    measure = Measurer(judge.segmenter, to_unit_range(known.images[rest]), wanted[rest])
    rows = (~rest).nonzero()[:COUNT, 0]
    asked, heads = wanted[rows], to_unit_range(known.images[rows])
    y = {name: values[rows] for name, values in known.y.items()}
    fresh = measure(heads).round(decimals=3)
    result = {
        "machine": machine(),
        "setting": f"{COUNT} samples of {STEPS} DPM-Solver++ steps, clipped, fp32, asked for the height, "
        f"atrophy and head size of as many fresh heads; measured by a regression on {int(rest.sum())} others",
        "asked": {name: asked[:, place].tolist() for place, name in enumerate(FACTORS)},
        "rows": {},
    }

    def note(name: str, images: Tensor, calls: float) -> None:
        measured, features = measure(images).round(decimals=3), embed(images, judge.segmenter)
        row = {"calls a step": round(calls, 2), **summary(asked, measured, fresh)}
        row |= recentred(with_intervals(lambda i: {"spread": spread(features[i], asked[i])}, len(images)))
        row |= {key: round(value, 4) for key, value in judge.distance(images).items()}
        row["measured"] = {n: measured[:, k].tolist() for k, n in enumerate(FACTORS)}
        result["rows"][name] = row
        RESULT.write_text(json.dumps(result) + "\n")
        line = ", ".join(f"{n} r {row[n]['r']:.3f} error {row[n]['error']:.3f}" for n in FACTORS)
        print(f"{name}: {line}; KID {row['KID']:.3f}, spread {row['spread']:.3f}", flush=True)

    note("fresh heads", heads, 0)
    for name, (way, calls) in tqdm(ways(denoise, weak).items()):
        note(name, draw(way, COUNT, y=y), calls)


if __name__ == "__main__":
    main()
