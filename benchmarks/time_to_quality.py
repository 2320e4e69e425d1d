"""The same minutes and the same steps for every network: whose samples are best?

``python benchmarks/time_to_quality.py ROOT`` needs the large phantom set (``python -m oasis_helpers phantoms
ROOT --cases 302 35 17``). It trains this U-Net and those of three well-known libraries (see ``networks.py``:
equal parameters within a tenth) by the same loop on the same slices, in fp32. Ours folds 2×2 pixels into
channels and works on 32×32; so that no network is judged by that alone, each of the others runs a second
time behind the same folding. First the speed of each is measured with all cores and nothing else running, in
turn, the median of three rounds; it says how many steps the minutes hold for each. A second race gives all as
many steps as the minutes hold for diffusers unfolded: enough to see heads, and few enough for the slowest.
The learning rate falls to zero over the steps. The runs go in parallel, a thread each, and are judged as
``judge.py`` says; beside them stands what a perfect generator would reach. On a GPU (see ``runs.py``) the
minutes are still those of a CPU, whose speeds must be there: ``--speeds`` measures them and stops.

A seed decides the initial weights, the order of the slices, timesteps and noise, and where sampling starts.
Three seeds can show a difference that is several times their spread: the interval of the mean of three is 2.5
standard deviations to each side. They cannot rank networks that come close.
Everything is stored as it comes: started again, it goes on. Draws ``figures/time_to_quality.png``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from judge import SETTING, draw, holm, judge_of, machine, paired
from networks import NETWORKS, missing, parameters, width_near
from runs import ON_GPU, in_parallel, trained, training_slices
from torch import Tensor, nn

from oasis_helpers import plots
from oasis_helpers.training import PROFILES, train

RESULT = Path(__file__).with_name("time_to_quality.json")
SAMPLED = RESULT.with_suffix(".npz")
PICTURE = Path(__file__).parents[1] / "figures" / "time_to_quality.png"
ROUNDS, FOLD = 3, 2
OURS, MEASURE = "oasis_helpers", "diffusers"  # whose minutes give the number of the same steps
MINUTES, STEPS = RACES = ("same minutes", "same steps")
SHOWN = ("KID", "FID", "precision", "coverage", "anatomy: ventricles", "anatomy: symmetry")
CONFIG = PROFILES["laptop"].replace(precision="fp32")


class Called(nn.Module):
    """A library's network, called as the loop calls its own."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, y=None) -> Tensor:
        output = self.network(x, t)
        return getattr(output, "sample", output)  # diffusers wraps its output


class Folded(Called):
    """The same behind pixel folding: the network sees (B, 4 C, H/2, W/2), and so it answers."""

    def forward(self, x: Tensor, t: Tensor, y=None) -> Tensor:
        return F.pixel_shuffle(super().forward(F.pixel_unshuffle(x, FOLD), t), FOLD)


def builders() -> dict[str, partial]:
    """How each network of the race is made from its width, by name; what is not installed is left out."""
    found = {}
    for name, make in NETWORKS.items():
        if name in missing():
            continue
        found[name] = partial(_build, Called, make, 1, CONFIG.objective.image_size)
        if name != OURS:  # which folds by itself
            size = CONFIG.objective.image_size // FOLD
            found[f"{name}, folded"] = partial(_build, Folded, make, FOLD**2, size)
    return found


def _build(wrapper, make, channels: int, size: int, width: int) -> nn.Module:
    return wrapper(make(width, channels, size))


def new_network(name: str, width: int, seed: int) -> nn.Module:
    """A network with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builders()[name](width)


def steps_per_second(name: str, width: int, slices: Tensor, count: int = 15) -> float:
    """Speed of training on all cores, with nothing beside it."""
    torch.set_num_threads(joblib.cpu_count())
    network = new_network(name, width, 0)
    for state in train(CONFIG.replace(steps=count + 3), slices, model=network, device="cpu"):
        if state.step == 3:
            started = time.perf_counter()
    return count / (time.perf_counter() - started)


def plan(speeds: dict[str, float], minutes: float) -> dict[str, dict[str, int]]:
    """How many steps each network makes in each race."""
    held = {name: int(60 * minutes * speed) for name, speed in speeds.items()}
    return {MINUTES: held, STEPS: dict.fromkeys(held, held[MEASURE])}


def measure(root: str, name: str, width: int, seed: int, steps: int) -> tuple[str, int, dict, np.ndarray]:
    """One run: network, seed, what it reached, and its first eight samples as bytes."""
    torch.set_num_threads(1)
    config = CONFIG.replace(steps=steps, warmup=min(CONFIG.warmup, steps // 5), seed=seed)
    slices = training_slices(root, config.objective.image_size)
    average = trained(config, slices, partial(new_network, name, width, seed)).average
    samples = draw(config.objective.denoiser(average), seed=seed)
    found = {"steps": steps} | judge_of(root).figures(samples)
    return name, seed, found, ((samples[:8] + 1) * 127.5).byte().numpy()


def differences(runs: dict[str, dict[str, dict]]) -> dict[str, dict[str, float]]:
    """By how much the KID of each network is above ours, seed by seed; p after Holm."""
    ours, found = runs.get(OURS, {}), {}
    for name, theirs in runs.items():
        seeds = sorted(ours.keys() & theirs.keys())
        if name != OURS and len(seeds) > 1:
            found[name] = paired(*([side[seed]["KID"] for seed in seeds] for side in (theirs, ours)))
    for row, p in zip(found.values(), holm([row["p"] for row in found.values()])):
        row["p"] = p
    return found


def common(runs: dict[str, dict[str, dict]]) -> list[str]:
    """The seeds that every network of a race has run with."""
    return sorted(set.intersection(*map(set, runs.values())))


def cells(runs: list[dict], what: str) -> str:
    """A figure of several runs as mean ± standard deviation; of one run its KID with the interval by head."""
    values = [run[what] for run in runs]
    if len(values) > 1:
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    interval = f" ({runs[0]['KID, low']:.2f} to {runs[0]['KID, high']:.2f})" if what == "KID" else ""
    return f"{values[0]:.2f}{interval}"


def table(result: dict, race: str) -> Iterator[str]:
    """A race as a table in Markdown, of the seeds that all networks have run with."""
    seeds = common(result[race])
    yield f"| {race}, seeds {', '.join(seeds)} | steps | " + " | ".join(SHOWN) + " |"
    yield "|---" * (len(SHOWN) + 2) + "|"
    for name, runs in result[race].items():
        found = [runs[seed] for seed in seeds]
        row = [name, f"{found[0]['steps']:,}", *(cells(found, what) for what in SHOWN)]
        yield f"| {' | '.join(row)} |"
    perfect = (cells([result["perfect generator"]], what) for what in SHOWN)
    yield f"| a perfect generator | | {' | '.join(perfect)} |"


def picture(minutes: float, names: list[str]):
    """Eight samples of each network after the same minutes, a row each, of seed 0."""
    with np.load(SAMPLED) as file:
        rows = {name: file[name] for name in names if name in file}
    images = [torch.from_numpy(image) for name in rows for image in rows[name]]
    title = f"{minutes:g} minutes of training each, synthetic. From above: {'; '.join(rows)}"
    return plots.grid(images, columns=8, title=textwrap.fill(title, 110))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder of the large phantom set")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--speeds", action="store_true", help="measure the speeds, and nothing else")
    parser.add_argument("--jobs", type=int, help="runs at the same time")
    args = parser.parse_args()
    makers = builders()
    print("not installed, left out:", ", ".join(missing()) or "none")
    ours = parameters(makers[OURS](PROFILES["laptop"].settings()["base_channels"]))
    widths = {name: width_near(make, ours) for name, make in makers.items()}
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if result.get("steps per second", {}).keys() != widths.keys():
        if ON_GPU:
            parser.error(
                f"the minutes are those of a CPU: run it on one with --speeds, and bring {RESULT.name}."
            )
        slices = training_slices(args.root, CONFIG.objective.image_size)
        rounds = [{n: steps_per_second(n, w, slices) for n, w in widths.items()} for _ in range(ROUNDS)]
        speeds = {n: statistics.median(found[n] for found in rounds) for n in widths}
        result = {"speeds measured on": machine(), "steps per second": speeds}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    if args.speeds:
        print(result["steps per second"])
        return
    steps = plan(result["steps per second"], args.minutes)
    races = {  # what is there of the runs that are wanted
        race: {
            name: {s: run for s, run in result.get(race, {}).get(name, {}).items() if run["steps"] == count}
            for name, count in counts.items()
        }
        for race, counts in steps.items()
    }
    result = {
        "machine": machine(),
        "setting": f"{args.minutes:g} minutes each, or the steps that {MEASURE} makes in them; laptop "
        f"profile's loop, fp32, {args.seeds} seeds; {SETTING}",
        "minutes": args.minutes,
        "parameters": {name: parameters(make(widths[name])) for name, make in makers.items()},
        "speeds measured on": result["speeds measured on"],
        "steps per second": result["steps per second"],
        "perfect generator": judge_of(args.root).perfect(),
    }
    wanted = {  # one run serves both races where its number of steps is the same
        (name, seed, count): None
        for seed in range(args.seeds)
        for race, counts in steps.items()
        for name, count in counts.items()
        if str(seed) not in races[race][name]
    }
    jobs = [(args.root, n, widths[n], seed, count) for n, seed, count in wanted]

    def stored() -> dict:
        found = result | races | {"KID above ours": {race: differences(races[race]) for race in RACES}}
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
        return found

    for name, seed, found, samples in in_parallel(measure, jobs, args.jobs):
        for race in RACES:
            if steps[race][name] == found["steps"]:
                races[race][name][str(seed)] = found
        print(f"{name}, seed {seed}: {found}", flush=True)
        stored()
        if seed == 0 and steps[MINUTES][name] == found["steps"]:
            kept = dict(np.load(SAMPLED)) if SAMPLED.exists() else {}
            np.savez_compressed(SAMPLED, **kept | {name: samples})
    found = stored()
    print(found["machine"], "·", found["setting"])
    for race in RACES:
        print("", *table(found, race), sep="\n")
    if not SAMPLED.exists():
        print(f"{PICTURE.name} is not drawn anew: the samples of seed 0 are not here.")
        return
    best = sorted(makers, key=lambda name: races[MINUTES][name]["0"]["KID"])
    PICTURE.write_bytes(plots.png(picture(args.minutes, best)))


if __name__ == "__main__":
    import time_to_quality  # by its name, so that the worker processes find what is in it

    time_to_quality.main()
