"""What each choice in training is worth: one change at a time, five seeds.

``python benchmarks/ablations.py`` trains 110 small networks (about two hours on two cores), prints the
table and stores it; started again it goes on where it stopped. All networks learn from the default phantoms
at 32×32 (one at 64×64) and, but for the batches of the same time, see the same number of images. They are
judged as ``judge.py`` says, but by 256 samples; real heads and samples alike have 32×32 pixels and are
enlarged for the segmenter, so that all rows stand on one scale. Every setting is compared with the first of
its choice, seed by seed. Precision fp32 and one thread a run, so that only the batches of the same time hang
on the machine.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cache
from pathlib import Path

import torch
from judge import STEPS, draw, holm, judge_of, machine, over_seeds, paired, shrunk
from runs import ON_GPU, in_parallel, trained

from oasis_helpers.data import load_slices
from oasis_helpers.phantoms import make_phantoms, phantom_cache
from oasis_helpers.training import TrainConfig, train

RESULT = Path(__file__).with_name("ablations.json")
SEEDS = (0, 1, 2, 3, 4)
SAMPLES, SIZE = 256, 32
BASE = TrainConfig(steps=500, lr=2e-3, ema_decay=0.995).replace(image_size=SIZE, base_channels=16)
SETTING = (
    f"KID of {SAMPLES} samples of {SIZE}×{SIZE}, {STEPS} DPM-Solver++ steps, fp32, {len(SEEDS)} seeds; "
    "intervals 95 % over seeds (Student's t), differences to the first setting by seed, p after Holm"
)

# What is changed → the settings tried, each as the fields that differ from BASE.
CHOICES: dict[str, dict[str, dict]] = {
    "schedule": {name: {"schedule": name} for name in ("cosine", "linear", "quadratic", "sigmoid")},
    "prediction": {
        "v": {},
        "noise": {"prediction": "epsilon"},
        "image": {"prediction": "sample"},
    },
    "loss": {"L2": {}, "L1": {"loss": "l1"}, "Huber": {"loss": "huber"}},
    "weighting": {
        "none": {},
        "min-SNR 5": {"min_snr_gamma": 5.0},
        "min-SNR 5 of SNR + 1": {"min_snr_gamma": 5.0, "snr_offset": 1.0},
    },
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


BATCHES = (16, 4, 64)


def choices(seconds: dict[str, float]) -> dict[str, dict[str, dict]]:
    """All choices; ``seconds`` of a step by batch size say how many steps take the same time."""
    same_time = {"16": {}}
    for batch in BATCHES[1:]:
        steps = round(BASE.steps * seconds["16"] / seconds[str(batch)])
        same_time[str(batch)] = {"batch_size": batch, "steps": steps, "warmup": steps // 10}
    return CHOICES | {"batch (same time)": same_time}


@cache
def training_slices(size: int) -> torch.Tensor:
    """Training slices of the default phantoms as bytes."""
    return load_slices(make_phantoms(phantom_cache()).train, size)


def seconds_per_step(batch: int, count: int = 30) -> float:
    """Of the base configuration with another batch, on one thread with nothing beside it."""
    torch.set_num_threads(1)
    for state in train(BASE.replace(batch_size=batch, steps=count + 5), training_slices(SIZE), device="cpu"):
        if state.step == 5:
            started = time.perf_counter()
    return (time.perf_counter() - started) / count


def measure(name: str, config: TrainConfig) -> tuple[str, dict[str, float]]:
    """One training run: its name, KID of the averaged and of the last weights, and the seconds it took."""
    torch.set_num_threads(1)
    judge, objective = judge_of(size=SIZE), config.objective
    slices, started = training_slices(objective.image_size), time.perf_counter()
    networks = trained(config, slices)
    found = {"seconds": time.perf_counter() - started}
    for which, network in (("average", networks.average), ("last step", networks.last)):
        samples = draw(objective.denoiser(network), SAMPLES, seed=config.seed)
        found[which] = judge.distance(shrunk(samples, SIZE))["KID"]
    return name, found


def key(config: TrainConfig) -> str:
    """The name of a run in the file: what differs from BASE."""
    base = BASE.settings()
    return ", ".join(f"{k}={v}" for k, v in config.settings().items() if v != base[k]) or "base"


def rows(runs: dict[str, dict], seconds: dict[str, float]) -> list[dict]:
    """The table: KID of every seed, mean and interval, and the difference to the first setting of the choice.

    Only settings whose seeds are all there; p is corrected for all comparisons in the table (Holm).
    """
    table = []
    for choice, settings in choices(seconds).items():
        base = None
        for setting, changes in settings.items():
            which = "last step" if setting == "last step" else "average"
            names = [key(BASE.replace(seed=seed, **changes)) for seed in SEEDS]
            if not all(name in runs for name in names):
                continue
            values = [runs[name][which] for name in names]
            is_first = setting == next(iter(settings))
            base = values if is_first else base
            row = {"choice": choice, "setting": setting, "kid": values} | over_seeds(values)
            table.append(row | {"difference": None if is_first or base is None else paired(values, base)})
    compared = [row["difference"] for row in table if row["difference"]]
    for difference, p in zip(compared, holm([difference["p"] for difference in compared])):
        difference["p"] = p
    return table


def show(result: dict) -> None:
    """Print the table."""
    print(result["machine"], "·", result["setting"])
    print(f"a perfect generator: {result['perfect generator']['KID']:.3f}\n")
    before = None
    for row in result["table"]:
        name = row["choice"] if row["choice"] != before else ""
        line = f"{name:<24} {row['setting']:<21} {row['mean']:7.3f} ({row['low']:.3f} to {row['high']:.3f})"
        if found := row["difference"]:
            line += (
                f"   {found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f}), p {found['p']:.2g}"
            )
        print(line)
        before = row["choice"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="forget the runs that are stored")
    parser.add_argument("--jobs", type=int, help="runs at the same time")
    parser.add_argument("--speeds", action="store_true", help="measure the seconds of a step, no more")
    args = parser.parse_args()
    result = {}
    if RESULT.exists() and not args.fresh:
        result = json.loads(RESULT.read_text())
    if result.get("setting") != SETTING:
        result = {}  # of another protocol
    runs = result.get("runs", {})
    seconds = result.get("seconds per step")
    if seconds is None and ON_GPU:
        parser.error(f"the same time is a CPU's: run it on one with --speeds, and bring {RESULT.name}.")
    seconds = seconds or {str(batch): seconds_per_step(batch) for batch in BATCHES}
    if args.speeds:
        RESULT.write_text(json.dumps({"setting": SETTING, "seconds per step": seconds}, indent=1) + "\n")
        return
    judge = judge_of(size=SIZE)
    others = judge.real.others
    result = {
        "machine": machine(),
        "setting": SETTING,
        "base": BASE.settings(),
        "seconds per step": seconds,
        "perfect generator": judge.distance(others.images, others.cases),
    }
    wanted = {}
    for seed in SEEDS:
        for settings in choices(seconds).values():
            for changes in settings.values():
                config = BASE.replace(seed=seed, **changes)
                wanted[key(config)] = config
    missing = {name: config for name, config in wanted.items() if name not in runs}

    def stored() -> dict:
        found = result | {"table": rows(runs, seconds), "runs": runs}
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
        return found

    for name, found in in_parallel(measure, missing.items(), args.jobs):
        runs[name] = found
        print(f"{len(runs)}/{len(wanted)} {name}: {found}", flush=True)
        stored()
    show(stored())


if __name__ == "__main__":
    import ablations  # by its name, so that the worker processes find what is in it

    ablations.main()
