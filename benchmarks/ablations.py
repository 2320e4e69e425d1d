"""What each choice in training is worth: one change at a time, three seeds.

``python benchmarks/ablations.py`` trains 57 small networks (about an hour on two cores), prints the
table and stores it; started again it goes on where it stopped. All networks learn from the default phantoms
at 32×32 (one at 64×64), see the same number of images and are judged by the KID between 256 samples
and all held-out slices in the features of the segmenter that ships. Pictures of 32×32 are enlarged first,
real ones too. Precision fp32, so that the table does not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from functools import cache
from pathlib import Path

import joblib
import torch

from oasis_helpers.data import find_data, load_slices, to_unit_range
from oasis_helpers.evaluation import embed, kid, load_segmenter, resize_for_segmenter
from oasis_helpers.phantoms import make_phantoms, phantom_cache
from oasis_helpers.sampling import clipped, sample_images
from oasis_helpers.training import TrainConfig, train

RESULT = Path(__file__).with_name("ablations.json")
SEEDS = (0, 1, 2)
SAMPLES, SAMPLING_STEPS = 256, 20
BASE = TrainConfig(steps=500, lr=2e-3, ema_decay=0.995).replace(image_size=32, base_channels=16)

# What is changed → the settings tried, each as the fields that differ from BASE.
CHOICES: dict[str, dict[str, dict]] = {
    "schedule": {name: {"schedule": name} for name in ("cosine", "linear", "quadratic", "sigmoid")},
    "prediction": {
        "v": {},
        "noise": {"prediction": "epsilon"},
        "image": {"prediction": "sample"},
    },
    "loss": {"L2": {}, "L1": {"loss": "l1"}, "Huber": {"loss": "huber"}},
    "weighting": {"none": {}, "min-SNR 5": {"min_snr_gamma": 5.0}},
    # min-SNR gives all three the same weights: what is left is what the network puts out
    "prediction, min-SNR 5": {
        "v": {"min_snr_gamma": 5.0},
        "noise": {"prediction": "epsilon", "min_snr_gamma": 5.0},
        "image": {"prediction": "sample", "min_snr_gamma": 5.0},
    },
    "T": {"1000": {}, "500": {"T": 500}, "200": {"T": 200}},
    "batch (same images)": {
        "16": {},
        "4": {"batch_size": 4, "steps": 2000, "warmup": 200},
        "64": {"batch_size": 64, "steps": 125, "warmup": 12},
    },
    "learning rate": {"2e-3": {}, "5e-4": {"lr": 5e-4}, "8e-3": {"lr": 8e-3}},
    "average, rate falls": {"EMA 0.995": {}, "last step": {}},
    "average, rate constant": {
        "EMA 0.995": {"lr_schedule": "constant"},
        "last step": {"lr_schedule": "constant"},
    },
    "image size": {"32×32": {}, "64×64": {"image_size": 64}},
}


class Judge:
    """Slices to learn from and to be compared with, at any size."""

    def __init__(self, root: str | None = None):
        # by default not find_data(): these figures are about phantoms
        location = find_data(root) if root else make_phantoms(phantom_cache())
        self.segmenter, self.folders = load_segmenter(), (location.validate, location.test)
        self.train_folder, self.cache = location.train, {}

    def at(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Training slices as bytes, and the features of all held-out ones."""
        if size not in self.cache:
            held_out = torch.cat([load_slices(folder, size) for folder in self.folders])
            features = embed(resize_for_segmenter(to_unit_range(held_out)), self.segmenter)
            self.cache[size] = load_slices(self.train_folder, size), features
        return self.cache[size]

    def distance(self, images: torch.Tensor, size: int) -> float:
        """KID between images (B, 1, size, size) and the held-out slices."""
        return kid(self.at(size)[1], embed(resize_for_segmenter(images), self.segmenter))[0]


@cache
def judge_of_this_process(root: str | None = None) -> Judge:
    return Judge(root)


def measure(name: str, config: TrainConfig) -> tuple[str, dict[str, float]]:
    """One training run: its name, KID of the averaged and of the last weights, and the seconds it took."""
    torch.set_num_threads(1)  # so small a network gains nothing from a second thread; two processes do
    judge, started = judge_of_this_process(), time.perf_counter()
    objective = config.objective
    *_, state = train(config, judge.at(objective.image_size)[0], device="cpu")
    found = {"seconds": time.perf_counter() - started}
    for which, network in (("average", state.ema.model), ("last step", state.model.eval())):
        denoise = clipped(objective.denoiser(network))
        samples = sample_images(denoise, SAMPLES, method="ddim", steps=SAMPLING_STEPS, seed=config.seed)
        found[which] = judge.distance(samples, objective.image_size)
    return name, found


def key(config: TrainConfig) -> str:
    """The name of a run in the file: what differs from BASE."""
    base = BASE.settings()
    return ", ".join(f"{k}={v}" for k, v in config.settings().items() if v != base[k]) or "base"


def rows(runs: dict[str, dict]) -> list[dict]:
    """The table: choice, setting, the KID of every seed, their mean and standard deviation."""
    table = []
    for choice, settings in CHOICES.items():
        for setting, changes in settings.items():
            which = "last step" if setting == "last step" else "average"
            names = [key(BASE.replace(seed=seed, **changes)) for seed in SEEDS]
            values = [runs[name][which] for name in names if name in runs]
            if len(values) == len(SEEDS):
                mean, deviation = statistics.mean(values), statistics.stdev(values)
                table.append(
                    {"choice": choice, "setting": setting, "kid": values, "mean": mean, "sd": deviation}
                )
    return table


def show(result: dict) -> None:
    """Print the table."""
    print(result["setting"], "·", result["machine"])
    print(f"real slices against real slices: {result['floor']:.3f}\n")
    before = None
    for row in result["table"]:
        name = row["choice"] if row["choice"] != before else ""
        print(f"{name:<24} {row['setting']:<12} {row['mean']:7.3f} ± {row['sd']:.3f}")
        before = row["choice"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="forget the runs that are stored")
    parser.add_argument("--jobs", type=int, default=joblib.cpu_count(), help="runs at the same time")
    args = parser.parse_args()
    judge, result = Judge(), {}
    if RESULT.exists() and not args.fresh:
        result = json.loads(RESULT.read_text())
    runs = result.get("runs", {})
    wanted = {}
    for seed in SEEDS:
        for settings in CHOICES.values():
            for changes in settings.values():
                config = BASE.replace(seed=seed, **changes)
                wanted[key(config)] = config
    missing = {name: config for name, config in wanted.items() if name not in runs}
    jobs = (joblib.delayed(measure)(name, config) for name, config in missing.items())
    for name, found in joblib.Parallel(args.jobs, return_as="generator_unordered")(jobs):
        runs[name] = found
        print(f"{len(runs)}/{len(wanted)} {name}: {found}", flush=True)
        result = {
            "machine": f"{joblib.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}",
            "setting": f"KID of {SAMPLES} samples, {SAMPLING_STEPS} DDIM steps, {len(SEEDS)} seeds",
            "base": BASE.settings(),
            "floor": judge.distance(to_unit_range(judge.at(32)[0][::4]), 32),
            "table": rows(runs),
            "runs": runs,
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    import ablations  # by its name, so that the worker processes find what is in it

    ablations.main()
