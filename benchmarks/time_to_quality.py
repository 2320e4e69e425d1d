"""The same minutes for every network: whose samples are best?

``python benchmarks/time_to_quality.py ROOT`` needs the large phantom set (``python -m oasis_helpers phantoms
ROOT --cases 302 35 17``). It trains this U-Net and those of three well-known libraries (see ``networks.py``:
equal parameters within a tenth) by the same loop on the same slices, three seeds. First the speed of each is
measured with all cores and nothing else running, in turn, the median of five rounds; it says how many steps
the minutes hold for each, and the learning rate falls to zero over them. The runs themselves then go in
parallel, a thread each. Judged by what ``evaluation.py`` measures: distances, precision and coverage between
320 samples and the held-out slices in the features of the segmenter, and how far their anatomy is off;
beside it, as the floor, the same for 320 slices of other heads.
Everything is stored as it comes: started again, it goes on. Draws ``figures/time_to_quality.png``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import joblib
import numpy as np
import torch
from networks import NETWORKS, parameters, width_near
from torch import nn

from oasis_helpers import plots
from oasis_helpers.data import find_data, load_slices
from oasis_helpers.evaluation import (
    Split,
    anatomy,
    anatomy_distances,
    embed,
    fid,
    kid,
    load_segmenter,
    load_split,
    precision_recall,
    segment,
)
from oasis_helpers.sampling import clipped, sample_images
from oasis_helpers.training import PROFILES, autocast, train

RESULT = Path(__file__).with_name("time_to_quality.json")
SAMPLED = RESULT.with_suffix(".npz")
PICTURE = Path(__file__).parents[1] / "figures" / "time_to_quality.png"
SEEDS, ROUNDS, SAMPLES, SAMPLING_STEPS = (0, 1, 2), 5, 320, 20
SHOWN = ("KID", "FID", "precision", "coverage", "brain", "ventricles", "symmetry")
CONFIG = PROFILES["laptop"].replace(precision="bf16")


class Called(nn.Module):
    """A library's network, called as the loop calls its own."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x, t, y=None):
        output = self.network(x, t)
        return getattr(output, "sample", output)  # diffusers wraps its output


def fresh(name: str, width: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Called(NETWORKS[name](width))


def steps_per_second(name: str, width: int, slices: torch.Tensor, count: int = 15) -> float:
    """Speed of training on all cores, with nothing beside it."""
    torch.set_num_threads(joblib.cpu_count())
    for state in train(CONFIG.replace(steps=count + 3), slices, model=fresh(name, width, 0), device="cpu"):
        if state.step == 3:
            started = time.perf_counter()
    return count / (time.perf_counter() - started)


def quality(split: Split, real: Split, segmenter) -> dict[str, float]:
    """How far the images are from the real ones, as features and as anatomy (in deviations of the real)."""
    found = {"KID": kid(real.features, split.features)[0], "FID": fid(real.features, split.features)}
    found |= precision_recall(real.features, split.features, cases=(real.cases, split.cases))
    parts = (anatomy(segment(images, segmenter)) for images in (real.images, split.images))
    return found | anatomy_distances(*parts)


def floor(root: str) -> dict[str, float]:
    """What as many slices of other heads reach."""
    location, segmenter = find_data(root), load_segmenter()
    real, others = (load_split(folder, segmenter) for folder in (location.validate, location.test))
    some = torch.linspace(0, len(others.cases) - 1, SAMPLES).long()
    cases = [others.cases[i] for i in some.tolist()]
    return quality(Split(others.images[some], others.features[some], cases), real, segmenter)


def measure(root: str, name: str, width: int, seed: int, steps: int) -> tuple[str, int, dict, np.ndarray]:
    """One run: network, seed, what it reached, and its first eight samples as bytes."""
    torch.set_num_threads(1)
    location, segmenter = find_data(root), load_segmenter()
    config = CONFIG.replace(steps=steps, warmup=min(CONFIG.warmup, steps // 5), seed=seed)
    slices = load_slices(location.train, config.objective.image_size)
    *_, state = train(config, slices, model=fresh(name, width, seed), device="cpu")
    denoise = clipped(config.objective.denoiser(state.ema.model))
    with autocast(config, torch.device("cpu")):
        samples = sample_images(denoise, SAMPLES, method="dpm_solver", steps=SAMPLING_STEPS, seed=seed)
    samples = samples.float().clamp(-1, 1)
    each = Split(samples, embed(samples, segmenter), list(range(SAMPLES)))
    found = {"steps": steps} | quality(each, load_split(location.validate, segmenter), segmenter)
    return name, seed, found, ((samples[:8] + 1) * 127.5).byte().numpy()


def show(result: dict) -> None:
    """Print the table."""
    print(result["machine"], "·", result["setting"])
    print(f"{'':<28}{'parameters':>11}{'steps':>7}" + "".join(f"{what:>15}" for what in SHOWN))
    print(
        f"{'other held-out slices':<46}" + "".join(f"{result['floor'][what]:>8.2f}{'':7}" for what in SHOWN)
    )
    for name, runs in result["runs"].items():
        line = f"{name:<28}{result['parameters'][name]:>11,}{next(iter(runs.values()))['steps']:>7}"
        for what in SHOWN:
            values = [run[what] for run in runs.values()]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{'':7}"
            line += f"{statistics.mean(values):>8.2f}{spread}"
        print(line)


def picture(minutes: float):
    """Eight samples of each network, a row each, of seed 0."""
    with np.load(SAMPLED) as file:
        rows = {name: file[name] for name in NETWORKS if name in file}
    images = [torch.from_numpy(image) for name in rows for image in rows[name]]
    title = f"{minutes:g} minutes of training each, from above: {', '.join(rows)} · synthetic"
    return plots.grid(images, columns=8, title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder of the large phantom set")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--jobs", type=int, default=joblib.cpu_count(), help="runs at the same time")
    args = parser.parse_args()
    ours = parameters(NETWORKS["oasis_helpers"](CONFIG.base_channels))
    widths = {name: width_near(name, ours) for name in NETWORKS}
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": {}}
    if "steps per second" not in result:
        slices = load_slices(find_data(args.root).train, CONFIG.objective.image_size)
        rounds = [{n: steps_per_second(n, w, slices) for n, w in widths.items()} for _ in range(ROUNDS)]
        result["steps per second"] = {n: statistics.median(found[n] for found in rounds) for n in widths}
    speeds, runs = result["steps per second"], result["runs"]
    result |= {
        "floor": floor(args.root),
        "machine": f"{joblib.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}",
        "setting": f"{args.minutes:g} minutes each, laptop profile's loop, {len(SEEDS)} seeds, "
        f"{SAMPLES} samples of {SAMPLING_STEPS} DPM-Solver++ steps",
        "parameters": {name: parameters(NETWORKS[name](width)) for name, width in widths.items()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    jobs = [
        joblib.delayed(measure)(args.root, name, width, seed, int(60 * args.minutes * speeds[name]))
        for seed in SEEDS
        for name, width in widths.items()
        if str(seed) not in runs.get(name, {})
    ]
    for name, seed, found, samples in joblib.Parallel(args.jobs, return_as="generator_unordered")(jobs):
        runs.setdefault(name, {})[str(seed)] = found
        print(f"{name}, seed {seed}: {found}", flush=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        if seed == SEEDS[0]:
            kept = dict(np.load(SAMPLED)) if SAMPLED.exists() else {}
            np.savez_compressed(SAMPLED, **kept | {name: samples})
    show(result)
    PICTURE.write_bytes(plots.png(picture(args.minutes), dpi=100))


if __name__ == "__main__":
    import time_to_quality  # by its name, so that the worker processes find what is in it

    time_to_quality.main()
