"""The same minutes for every network: whose samples are best?

``python benchmarks/time_to_quality.py [--minutes 5]`` trains this U-Net and those of three well-known
libraries (see ``networks.py``: equal parameters within a tenth) by the same loop on the same
phantoms, each for the same wall-clock time on all cores, three seeds. The number of steps follows from
the speed of the first ones, so that the learning rate has fallen to zero when time is up. Judged by the
KID between 256 samples and held-out slices in the features of the segmenter. Runs are stored one by one:
started again, it goes on. Draws ``figures/time_to_quality.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ablations import Judge
from networks import NETWORKS, parameters, width_near
from torch import nn

from oasis_helpers import plots
from oasis_helpers.sampling import sample_images
from oasis_helpers.training import PROFILES, autocast, train

RESULT = Path(__file__).with_name("time_to_quality.json")
SAMPLED = RESULT.with_suffix(".npz")
PICTURE = Path(__file__).parents[1] / "figures" / "time_to_quality.png"
SEEDS, SAMPLES, SAMPLING_STEPS = (0, 1, 2), 256, 25
CONFIG = PROFILES["laptop"]


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


def steps_in(seconds: float, name: str, width: int, slices: torch.Tensor) -> int:
    """How many steps this network makes in the given time, from ten of them."""
    config = replace(CONFIG, steps=13)
    for state in train(config, slices, model=fresh(name, width, 0), device="cpu"):
        if state.step == 3:
            started = time.perf_counter()
    return max(int(seconds * 10 / (time.perf_counter() - started)), config.warmup)


def measure(name: str, width: int, seed: int, seconds: float, judge: Judge) -> tuple[dict, torch.Tensor]:
    """One run: what it reached, and its first eight samples."""
    slices = judge.at(CONFIG.image_size)[0]
    steps = steps_in(seconds, name, width, slices)
    config = replace(CONFIG, steps=steps, warmup=min(CONFIG.warmup, steps // 5), seed=seed)
    started = time.perf_counter()
    *_, state = train(config, slices, model=fresh(name, width, seed), device="cpu")
    seconds = time.perf_counter() - started
    shape = (SAMPLES, 1, config.image_size, config.image_size)
    with autocast(config, torch.device("cpu")):
        samples = sample_images(
            state.ema.model, config.make_schedule(), shape, method="ddim", steps=SAMPLING_STEPS,
            seed=seed, prediction=config.prediction,
        ).float()  # fmt: skip
    found = {"steps": steps, "seconds": seconds, "kid": judge.distance(samples, config.image_size)}
    return found, samples[:8]


def show(result: dict) -> None:
    """Print the table."""
    print(result["machine"], "·", result["setting"])
    print(f"{'network':<28} {'parameters':>11} {'steps':>7} {'seconds':>8} {'KID':>16}")
    for name, runs in result["runs"].items():
        kids = [run["kid"] for run in runs.values()]
        spread = f" ± {statistics.stdev(kids):.3f}" if len(kids) > 1 else ""
        steps, seconds = (statistics.mean(run[k] for run in runs.values()) for k in ("steps", "seconds"))
        count = result["parameters"][name]
        print(f"{name:<28} {count:>11,} {steps:>7.0f} {seconds:>8.0f} {statistics.mean(kids):>8.3f}{spread}")


def picture(minutes: float):
    """Eight samples of each network, a row each, of seed 0."""
    rows = np.load(SAMPLED)
    titles = [name if i == 0 else "" for name in rows for i in range(8)]
    images = [torch.from_numpy(image) for name in rows for image in rows[name]]
    title = f"{minutes:g} minutes of training each · synthetic – not for diagnosis"
    return plots.grid(images, columns=8, titles=titles, title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    judge = Judge()
    ours = parameters(NETWORKS["oasis_helpers"](CONFIG.base_channels))
    widths = {name: width_near(name, ours) for name in NETWORKS}
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": {}}
    result |= {
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}",
        "setting": f"{args.minutes:g} minutes each, laptop profile's loop, {len(SEEDS)} seeds, "
        f"KID of {SAMPLES} samples of {SAMPLING_STEPS} DDIM steps",
        "parameters": {name: parameters(NETWORKS[name](width)) for name, width in widths.items()},
    }
    for seed in SEEDS:
        for name, width in widths.items():
            runs = result["runs"].setdefault(name, {})
            if str(seed) in runs:
                continue
            runs[str(seed)], samples = measure(name, width, seed, 60 * args.minutes, judge)
            print(f"{name}, seed {seed}: {runs[str(seed)]}", flush=True)
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
            if seed == SEEDS[0]:
                kept = dict(np.load(SAMPLED)) if SAMPLED.exists() else {}
                np.savez_compressed(SAMPLED, **kept | {name: ((samples + 1) * 127.5).byte().numpy()})
    show(result)
    PICTURE.write_bytes(plots.png(picture(args.minutes), dpi=100))


if __name__ == "__main__":
    main()
