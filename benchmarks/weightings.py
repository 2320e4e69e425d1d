"""Which weight of the loss makes better samples: three of them in the laptop profile, several seeds each.

``python benchmarks/weightings.py ROOT OUT`` needs the large phantom set (``python -m oasis_helpers phantoms
ROOT --cases 302 35 17``). For v-prediction, min-SNR with γ = 5 takes the weight away where hardly any signal
is left, which is where every sampler begins; counting one more than the SNR keeps it. Each weighting trains
the laptop profile in fp32 for as many steps as five minutes hold on all cores (see ``minutes.py``), with five
seeds, a thread each. Beside the KID of every run it stores how far the first estimate, at t = T − 1, is from
the best there is, the mean of the training slices; and whether ten steps of second order are better than ten
of first order from the same noise. Weights go to the folder OUT, results are stored as they come: started
again, it goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from judge import SETTING, described, draw, holm, judge_of, machine, over_seeds, paired
from minutes import speed_in
from runs import DEVICE, in_parallel, trained_to, training_slices
from torch import Tensor

from oasis_helpers.data import find_data, to_unit_range
from oasis_helpers.training import PROFILES, TrainConfig, load_weights

RESULT = Path(__file__).with_name("weightings.json")
MINUTES, FEW_STEPS, NOISES = 5, 10, 32
LAPTOP = PROFILES["laptop"].replace(precision="fp32")  # so that the table does not depend on the machine
WEIGHTINGS = {
    "none": {"min_snr_gamma": None, "snr_offset": 0.0},
    "min-SNR 5": {"min_snr_gamma": 5.0, "snr_offset": 0.0},
    "min-SNR 5 of SNR + 1": {"min_snr_gamma": 5.0, "snr_offset": 1.0},
}
(SHIPPED,) = (name for name, fields in WEIGHTINGS.items() if LAPTOP.replace(**fields) == LAPTOP)


def configuration(weighting: str, seed: int, steps: int) -> TrainConfig:
    """The settings of one run."""
    warmup = min(LAPTOP.warmup, steps // 5)
    return LAPTOP.replace(steps=steps, warmup=warmup, seed=seed, **WEIGHTINGS[weighting])


def weights_file(out: Path, weighting: str, seed: int, steps: int) -> Path:
    """Where the weights of one run go."""
    return out / f"{weighting.replace(' ', '-')}-{steps}-steps-seed-{seed}.safetensors"


@torch.no_grad()
def first_step(denoise, mean: Tensor) -> float:
    """How far the estimate at t = T − 1 is from ``mean`` (1, 1, H, W): rms in grey levels, over 32 noises."""
    noise = torch.randn((NOISES, *denoise.shape), generator=torch.Generator().manual_seed(0))
    error = denoise(noise.to(denoise.device), denoise.schedule.T - 1).cpu() - mean
    return float(127.5 * error.square().flatten(1).mean(1).sqrt().mean())


def measure(root: str, out: Path, weighting: str, seed: int, steps: int) -> tuple[str, int, dict]:
    """One run: its weighting and seed, and what was found."""
    torch.set_num_threads(1)
    location, path = find_data(root), weights_file(out, weighting, seed, steps)
    config = configuration(weighting, seed, steps)
    slices = training_slices(root, config.objective.image_size)
    trained_to(path, config, slices, {"data": described(location)})
    judge, denoise = judge_of(root), load_weights(path, DEVICE)
    mean = to_unit_range(slices).mean(0, keepdim=True)
    few = {method: draw(denoise, method=method, steps=FEW_STEPS) for method in ("dpm_solver", "ddim")}
    found = judge.figures(draw(denoise)) | {
        "first step, grey levels": first_step(denoise, mean),
        "second less first order, 10 steps": judge.difference(few["dpm_solver"], few["ddim"]),
    }
    return weighting, seed, found


def summary(runs: dict[str, dict[str, dict]], seeds: int) -> dict[str, dict]:
    """Of the weightings all of whose seeds are there: means, and differences to the one that ships."""
    wanted = [str(seed) for seed in range(seeds)]
    whole = {n: [found[s] for s in wanted] for n, found in runs.items() if found.keys() >= set(wanted)}
    table, differences = {}, {}
    for name in (name for name in WEIGHTINGS if name in whole):
        order = [run["second less first order, 10 steps"]["difference"] for run in whole[name]]
        columns = {what: [run[what] for run in whole[name]] for what in ("KID", "first step, grey levels")}
        columns["second less first order, 10 steps"] = order
        table[name] = {what: {"seeds": values} | over_seeds(values) for what, values in columns.items()}
    if SHIPPED in table:
        base = table[SHIPPED]["KID"]["seeds"]
        differences = {n: paired(row["KID"]["seeds"], base) for n, row in table.items() if n != SHIPPED}
        for row, p in zip(differences.values(), holm([row["p"] for row in differences.values()])):
            row["p"] = p
    return {"weightings": table, "KID above the one that ships": differences}


def show(result: dict) -> None:
    """Print the table."""
    print(result["machine"], "·", result["setting"])
    for name, row in result["weightings"].items():
        cells = (f"{what} {v['mean']:.3g} ({v['low']:.3g} to {v['high']:.3g})" for what, v in row.items())
        print(f"{name:<24}" + "   ".join(cells))
    for name, row in result["KID above the one that ships"].items():
        interval = f"({row['low']:+.3f} to {row['high']:+.3f})"
        print(f"{name}: {row['mean']:+.3f} {interval} above {SHIPPED}, p {row['p']:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder of the large phantom set")
    parser.add_argument("out", type=Path, help="folder for the weights")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps of a run, by default what five minutes hold here")
    parser.add_argument("--jobs", type=int, help="runs at the same time")
    args = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    steps = args.steps or result.get("steps")
    if steps is None:
        slices = training_slices(args.root, LAPTOP.objective.image_size)
        steps = int(60 * MINUTES * speed_in(args.out, slices))
    if result.get("steps") != steps:
        result = {}  # of other runs
    judge_of(args.root)  # makes the fresh heads, once
    runs = {name: result.get("runs", {}).get(name, {}) for name in WEIGHTINGS}
    jobs = [
        (args.root, args.out, name, seed, steps)
        for seed in range(args.seeds)
        for name in WEIGHTINGS
        if str(seed) not in runs[name]
    ]

    def stored() -> dict:
        found = {
            "machine": machine(),
            "setting": f"laptop profile, fp32, {steps} steps, {args.seeds} seeds; {SETTING}; intervals "
            "95 % over seeds (Student's t), differences by seed, p after Holm",
            "steps": steps,
            "ships": SHIPPED,
            **summary(runs, args.seeds),
            "runs": runs,
        }
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
        return found

    for name, seed, found in in_parallel(measure, jobs, args.jobs):
        runs[name][str(seed)] = found
        print(f"{name}, seed {seed}: {found}", flush=True)
        stored()
    show(stored())


if __name__ == "__main__":
    import weightings  # by its name, so that the worker processes find what is in it

    weightings.main()
